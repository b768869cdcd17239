"""A master that is wrong, silent, killed, frozen or restarted: an error, soon, and no crash."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hicache_mooncake import MooncakeBackend, MooncakeConfig

from hicache_core.errors import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    UseAfterClose,
)
from hicache_core.types import BackendContext

AT_ONCE_S = 0.5  # far below the seconds that Mooncake itself blocks, far above a system call
RECOVERY_S = 15.0


def key(n: int) -> str:
    return f"{'0' * 16}/{n:064x}"


class Timed:
    """How long the block took."""

    def __enter__(self) -> Timed:
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.elapsed_s = time.monotonic() - self._start


def calls(backend: MooncakeBackend) -> list[Callable[[], Any]]:
    page = (memoryview(bytearray(64)),)
    return [
        lambda: backend.get(key(0)),
        lambda: backend.exists(key(0)),
        lambda: backend.set(key(0), b"value"),
        lambda: backend.batch_get([key(0)], [page]),
        lambda: backend.batch_set([key(0)], [page]),
        lambda: backend.batch_exists([key(0)]),
        lambda: backend.delete([key(0)]),
        lambda: backend.clear("x"),
    ]


def wait_until_stored(backend: MooncakeBackend, name: str) -> None:
    """Writes until the store takes it: clients come back to a new master by themselves."""
    deadline = time.monotonic() + RECOVERY_S
    while True:
        try:
            backend.set(name, b"value")
        except BackendError:
            assert time.monotonic() < deadline, "the client did not come back"
            time.sleep(0.1)
        else:
            return


def test_a_wrong_address_fails_at_once(make_backend: Callable[..., MooncakeBackend]) -> None:
    with (
        Timed() as timed,
        pytest.raises(BackendUnavailable, match=r"no mooncake_master at 127\.0\.0\.1:1 .*start it"),
    ):
        make_backend("127.0.0.1:1")
    assert timed.elapsed_s < AT_ONCE_S


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_port_fails_within_the_setup_timeout(
    silent_address: str, make_backend: Callable[..., MooncakeBackend]
) -> None:
    with Timed() as timed, pytest.raises(BackendUnavailable, match="could not be set up"):
        make_backend(silent_address, setup_timeout_s=1.5, rpc_timeout_s=20)
    assert timed.elapsed_s < 4


def test_a_set_up_that_mooncake_refuses_says_with_which_settings(
    master: Any, make_backend: Callable[..., MooncakeBackend]
) -> None:
    with pytest.raises(BackendUnavailable, match="protocol carrier_pigeon"):
        make_backend(master.address, protocol="carrier_pigeon")


def test_a_missing_client_library_is_named_with_the_way_to_install_it() -> None:
    code = (
        "import sys; sys.modules['mooncake.store'] = None\n"
        "from hicache_core.types import BackendContext\n"
        "from hicache_core.errors import BrokenBackend\n"
        "from hicache_mooncake import MooncakeBackend, MooncakeConfig\n"
        "config = MooncakeConfig(master_server_address='127.0.0.1:1')\n"
        "try:\n    MooncakeBackend(config, BackendContext('0')).open()\n"
        "except BrokenBackend as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hicache-mooncake[cpu]" in done.stdout
    assert "libibverbs1" in done.stdout


def test_a_call_before_open_or_after_close_is_refused(
    master: Any, make_backend: Callable[..., MooncakeBackend]
) -> None:
    config = MooncakeConfig(master_server_address=master.address)
    for call in calls(MooncakeBackend(config, BackendContext("0" * 16))):
        with pytest.raises(UseAfterClose):
            call()
    closed = make_backend(master.address, global_segment_size=0)
    closed.close()
    closed.close()
    for call in calls(closed):
        with pytest.raises(UseAfterClose):
            call()
    with pytest.raises(UseAfterClose):
        closed.register_memory([memoryview(bytearray(8))])


def test_close_waits_for_the_calls_in_flight(
    master: Any, make_backend: Callable[..., MooncakeBackend]
) -> None:
    backend = make_backend(master.address, require_registered=False)
    page = (memoryview(bytearray(1 << 20)),)
    names = [key(n) for n in range(32)]
    results: list[object] = []
    started = threading.Event()

    def work() -> None:
        while True:
            try:
                started.set()
                results.append(backend.batch_set(names, [page] * 32))
            except UseAfterClose as error:
                results.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    time.sleep(0.05)
    backend.close()
    thread.join(10)
    assert isinstance(results[-1], UseAfterClose)
    assert all(n == 32 for n in results[:-1])


def test_a_killed_master_fails_calls_at_once_and_a_restarted_one_serves_again(
    make_master: Callable[..., Any], make_backend: Callable[..., MooncakeBackend]
) -> None:
    server = make_master()
    backend = make_backend(server.address)
    backend.set(key(0), b"value")
    server.kill()
    for call in calls(backend):
        with Timed() as timed, pytest.raises(BackendUnavailable):
            call()
        assert timed.elapsed_s < AT_ONCE_S
    time.sleep(0.3)  # past the retry interval: tried again, and still gone
    with pytest.raises(BackendUnavailable, match="no mooncake_master"):
        backend.exists(key(0))

    server.restart()
    wait_until_stored(backend, key(1))
    assert backend.get(key(1)) == b"value"
    assert backend.get(key(0)) is None


def test_a_master_killed_in_mid_batch_is_an_error_or_a_smaller_count(
    make_master: Callable[..., Any], make_backend: Callable[..., MooncakeBackend]
) -> None:
    server = make_master()
    backend = make_backend(server.address, max_call_nbytes=65536)
    memory = memoryview(bytearray(os.urandom(32 << 20)))
    backend.register_memory([memory])
    pages = [(memory[n << 16 : (n + 1) << 16],) for n in range(512)]
    killer = threading.Timer(0.03, server.kill)
    killer.start()
    outcome: object = None
    with Timed() as timed:
        while outcome is None:
            try:
                backend.batch_set([key(n) for n in range(512)], pages)
                backend.batch_get([key(n) for n in range(512)], pages)
            except BackendError as error:
                outcome = error
    killer.join()
    assert isinstance(outcome, BackendUnavailable)
    assert timed.elapsed_s < 10
    server.restart()
    wait_until_stored(backend, key(1000))


def test_a_frozen_master_costs_one_timeout_and_then_nothing(
    make_master: Callable[..., Any], make_backend: Callable[..., MooncakeBackend]
) -> None:
    server = make_master()
    backend = make_backend(server.address, retry_interval_s=2.0)
    backend.set(key(0), b"value")
    server.freeze()
    try:
        with Timed() as timed, pytest.raises(BackendTimeout, match="did not answer in time"):
            backend.batch_exists([key(0)])
        assert timed.elapsed_s < 3
        for call in calls(backend):
            with Timed() as timed, pytest.raises(BackendUnavailable, match="not used for now"):
                call()
            assert timed.elapsed_s < AT_ONCE_S
    finally:
        server.thaw()
    deadline = time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        try:
            assert backend.get(key(0)) == b"value"
            return
        except BackendError:
            time.sleep(0.1)
    pytest.fail("the backend did not come back")


def test_while_one_caller_tries_a_lost_master_the_others_fail_at_once(
    make_master: Callable[..., Any], make_backend: Callable[..., MooncakeBackend]
) -> None:
    server = make_master()
    backend = make_backend(server.address, retry_interval_s=0.1)
    server.freeze()
    try:
        with pytest.raises(BackendTimeout):
            backend.exists(key(0))
        time.sleep(0.2)
        took: list[float] = []

        def ask() -> None:
            with Timed() as timed, pytest.raises(BackendError):
                backend.exists(key(0))
            took.append(timed.elapsed_s)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(elapsed_s > AT_ONCE_S for elapsed_s in took) == 1
    finally:
        server.thaw()
