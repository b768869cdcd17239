"""Answers of S3 that a real server here does not give, by an emulation of one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hicache_s3.channel import Pace, channel_of

from hicache_core.errors import (
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
)
from plugins.s3.tests.conftest import MakeBackend
from plugins.s3.tests.emulation import Emulation, Reply, error
from plugins.s3.tests.world import NBYTES, PAGE, blank, content, filled, hits, keys_of

KEY = keys_of(1)[0]
SLOW_DOWN = error(503, "SlowDown")
STORED = Reply(200)


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    server = Emulation()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("reply", "kind", "advice"),
    [
        (error(403, "RequestTimeTooSkewed"), BackendDenied, "clock"),
        (error(403, "AccessDenied"), BackendDenied, "s3:ListBucket"),
        (error(400, "ExpiredToken"), BackendDenied, "expired"),
        (
            error(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"),
            BackendDenied,
            "region is eu-west-3.*set region",
        ),
        (
            error(301, "PermanentRedirect", "<Endpoint>b.s3.eu-west-3.amazonaws.com</Endpoint>"),
            BackendError,
            "endpoint is b.s3.eu-west-3.*set region",
        ),
        (
            Reply(301, headers=(("x-amz-bucket-region", "eu-west-3"),)),
            BackendError,
            "region is eu-west-3",
        ),
        (error(404, "NoSuchBucket"), BackendError, "create_bucket"),
        (error(418, "Teapot"), BackendError, "Teapot.*418"),
        (Reply(500, b"<html>not S3</html>"), BackendUnavailable, "InternalError"),
    ],
)
def test_open_says_what_is_wrong_and_what_to_do(
    emulation: Emulation,
    make_backend: MakeBackend,
    reply: Reply,
    kind: type[BackendError],
    advice: str,
) -> None:
    emulation.last = reply
    start = time.monotonic()
    with pytest.raises(kind, match=advice):
        make_backend(emulation.url, retry_s=0.2)
    assert time.monotonic() - start < 20  # it does not wait for a time-out of minutes


def test_a_server_that_drips_is_given_up_as_soon_as_one_that_is_silent(
    emulation: Emulation, make_backend: MakeBackend
) -> None:
    emulation.last = Reply(200, drip_s=0.05)
    start = time.monotonic()
    with pytest.raises(BackendTimeout, match="no answer in time"):
        make_backend(emulation.url, read_timeout_s=0.5)
    assert time.monotonic() - start < 20  # the head alone would take minutes


def test_a_server_that_takes_a_byte_now_and_then_is_given_up() -> None:
    """Each wait is shorter than the limit; all of them would take hours."""
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def sip() -> None:
        while not stop.wait(0.05):
            theirs.recv(100)

    thread = threading.Thread(target=sip)
    thread.start()
    start = time.monotonic()
    channel = channel_of(ours, 0.2)
    with ours, theirs:
        try:
            with pytest.raises(TimeoutError):
                channel.send([memoryview(bytes(1 << 22))], channel.pace())
        finally:
            stop.set()
            thread.join()
    assert time.monotonic() - start < 20


def test_what_came_in_time_counts_even_if_the_thread_sees_it_late() -> None:
    """A busy machine may give the thread no time until the limit is over."""
    pace = Pace(0.02)
    time.sleep(0.04)
    pace.moved(3)
    with pytest.raises(TimeoutError):  # but it does not wait for more
        pace.left_s()


@pytest.mark.parametrize("nbytes", [99_999_999_999_999, 1 << 70])
def test_an_announced_length_beyond_all_memory_is_an_error_of_the_store(
    emulation: Emulation, make_backend: MakeBackend, nbytes: int
) -> None:
    backend = make_backend(emulation.url)
    emulation.last = Reply(200, b"x", nbytes=nbytes)
    with pytest.raises(BackendUnavailable, match="announces"):
        backend.get(KEY)


def test_slow_down_is_waited_out_and_counted(
    emulation: Emulation, make_backend: MakeBackend
) -> None:
    backend = make_backend(emulation.url, retry_s=5)
    emulation.replies = [SLOW_DOWN, SLOW_DOWN, STORED]
    backend.set(KEY, b"x")
    assert backend.stats()["slow_downs"] == 2
    emulation.replies = [SLOW_DOWN, Reply(200, content(KEY, NBYTES))]
    assert hits(backend, [KEY]) == 1
    assert backend.stats()["slow_downs"] == 3


def test_slow_down_without_end_is_an_error_in_bounded_time(
    emulation: Emulation, make_backend: MakeBackend
) -> None:
    backend = make_backend(emulation.url, retry_s=0.5)
    emulation.last = SLOW_DOWN
    start = time.monotonic()
    keys = keys_of(20)
    with pytest.raises(BackendUnavailable, match=r"SlowDown.*limits requests"):
        backend.batch_set(keys, [filled(key, PAGE) for key in keys])
    assert time.monotonic() - start < 20  # it does not wait for a time-out of minutes
    assert backend.stats()["slow_downs"] > 3


def test_a_full_store_ends_the_count(emulation: Emulation, make_backend: MakeBackend) -> None:
    backend = make_backend(emulation.url, threads=1, pack=False)
    keys = keys_of(5)
    full = error(507, "InsufficientStorage")
    emulation.last = full
    emulation.replies = [error(404, "NoSuchKey"), STORED, STORED, full, STORED]
    assert backend.batch_set(keys, [filled(key, PAGE) for key in keys]) == 2
    assert backend.stats()["dropped_writes"] == 3
    with pytest.raises(BackendFull, match=r"lifecycle"):
        backend.set(KEY, b"x")
    emulation.replies = [error(404, "NoSuchKey"), STORED, full, STORED, full, STORED]
    stored = backend.set_each(keys, [filled(key, PAGE) for key in keys])
    assert stored == [True, False, True, False, True]
    assert backend.stats()["dropped_writes"] == 5


def test_a_body_that_ends_early_fills_no_page(
    emulation: Emulation, make_backend: MakeBackend
) -> None:
    backend = make_backend(emulation.url)
    emulation.last = Reply(200, content(KEY, NBYTES)[:-10], nbytes=NBYTES)
    with pytest.raises(BackendUnavailable, match=r"middle of an object"):
        backend.batch_get([KEY], [blank(PAGE)])
    with pytest.raises(BackendUnavailable, match=r"middle of an object"):
        backend.get(KEY)


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(
    make_backend: MakeBackend,
) -> None:
    emulation = Emulation(Reply(200, content(KEY, NBYTES)), hang_up=True)
    emulation.replies = [error(404, "NoSuchKey")]
    try:
        backend = make_backend(emulation.url)
        for _ in range(5):
            assert hits(backend, [KEY]) == 1
    finally:
        backend.close()
        emulation.close()


def test_a_silent_server_is_a_timeout(emulation: Emulation, make_backend: MakeBackend) -> None:
    backend = make_backend(emulation.url, read_timeout_s=0.3)
    emulation.replies = [Reply(200, delay_s=1.0)]
    start = time.monotonic()
    with pytest.raises(BackendTimeout, match=r"no answer in time"):
        backend.get(KEY)
    assert time.monotonic() - start < 0.9


def test_a_range_that_the_server_ignores_fills_no_page(
    emulation: Emulation, make_backend: MakeBackend
) -> None:
    """A proxy may answer a ranged request with the whole object: its bytes are not those asked."""
    backend = make_backend(emulation.url, pack_nbytes=8 * NBYTES)
    keys = keys_of(8)
    emulation.last = STORED
    emulation.replies = [error(404, "NoSuchKey")]
    assert backend.batch_set(keys, [filled(key, PAGE) for key in keys]) == 8
    emulation.last = Reply(200, b"".join(content(key, NBYTES) for key in keys))
    assert hits(backend, keys[4:6]) == 0
