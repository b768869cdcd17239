"""What a real server refuses, and what happens when it is killed, frozen and started again."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hicache_core.errors import BackendDenied, BackendError, BackendTimeout, BackendUnavailable
from hicache_core.types import Page
from plugins.s3.tests.conftest import MakeBackend
from plugins.s3.tests.world import PAGE, blank, filled, hits, keys_of, put
from tests.servers.process import certificate as certificate_in
from tests.servers.process import free_port
from tests.servers.weed import KEY, READER_KEY, READER_SECRET, SECRET, Weed

PATTERN = b"\x5a" * (1 << 20)
READER = {"access_key_id": READER_KEY, "secret_access_key": READER_SECRET}
MIB = (64, 1 << 20)


def test_a_missing_bucket_is_named_or_made(make_backend: MakeBackend) -> None:
    with pytest.raises(BackendError, match=r"bucket absent.*NoSuchBucket.*create_bucket"):
        make_backend(bucket="absent")
    for _ in range(2):
        put(make_backend(bucket="made", create_bucket=True), keys_of(5))


def test_wrong_keys_are_denied(make_backend: MakeBackend) -> None:
    with pytest.raises(BackendDenied, match=r"secret_access_key belongs to another"):
        make_backend(secret_access_key="wrong-secret")
    with pytest.raises(BackendDenied, match=r"does not know this access_key_id"):
        make_backend(access_key_id="AKNOBODY")


def test_a_reader_reads_and_is_denied_the_rest(make_backend: MakeBackend) -> None:
    keys = keys_of(8)
    writer, reader = make_backend(), make_backend(**READER)
    put(writer, keys)
    assert reader.batch_exists(keys) == 8
    assert hits(reader, keys) == 8
    new = keys_of(8, "new")
    with pytest.raises(BackendDenied, match=r"s3:PutObject"):
        reader.batch_set(new, [filled(key, PAGE) for key in new])
    for gone in (keys[:1], keys):
        with pytest.raises(BackendDenied):
            reader.delete(gone)
    assert hits(writer, keys) == 8
    levels = {finding.topic: finding.level for finding in reader.diagnose()}
    assert levels["rights"] == "error"


def test_a_refused_connection_is_an_error_at_once(make_backend: MakeBackend) -> None:
    start = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"refused.*check endpoint_url"):
        make_backend(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - start < 20  # it does not wait for a time-out of minutes


def test_doctor_finds_a_healthy_bucket_without_expiry(make_backend: MakeBackend) -> None:
    findings = {finding.topic: finding for finding in make_backend().diagnose()}
    for topic in ("library", "bucket", "round trip", "listing"):
        assert findings[topic].level == "ok", findings[topic]
    assert findings["lifecycle"].level == "warning"
    assert "expire" in findings["lifecycle"].message


def test_killed_frozen_and_restarted_in_mid_batch(
    own_weed: Weed, make_backend: MakeBackend
) -> None:
    """One server for all of it, since starting one takes a second or more."""
    backend = make_backend(own_weed.url, read_timeout_s=1.0, pack=False)
    packed = make_backend(own_weed.url, read_timeout_s=1.0)
    keys = keys_of(24)
    put(backend, keys, MIB)
    more = keys_of(8, "packed")
    put(packed, more)

    own_weed.freeze()
    calls: list[Callable[[], object]] = [
        lambda: backend.batch_get(keys, [blank(MIB) for _ in keys]),
        lambda: backend.batch_set(keys, [filled(key, MIB) for key in keys]),
        lambda: packed.batch_get(more, [blank(PAGE) for _ in more]),
        lambda: packed.get_each(more, [blank(PAGE) for _ in more]),
        lambda: backend.set_each(keys, [filled(key, MIB) for key in keys]),
        lambda: backend.exists_each(keys),
        lambda: backend.batch_exists(keys),
        lambda: backend.get(keys[0]),
    ]
    for call in calls:
        start = time.monotonic()
        with pytest.raises(BackendTimeout):
            call()
        assert time.monotonic() - start < 4  # read_timeout_s is 1
    own_weed.thaw()
    assert eventually(lambda: hits(backend, keys, MIB) == 24)

    # Killed while a batch is under way: leading pages that are right, or an error.
    killer = threading.Timer(0.02, own_weed.kill)
    killer.start()
    while killer.is_alive():
        try:
            hits(backend, keys, MIB)
        except BackendUnavailable:
            break
    killer.join()
    with pytest.raises(BackendUnavailable):
        backend.batch_exists(keys)
    with pytest.raises(BackendUnavailable):
        packed.delete(more)
    with pytest.raises(BackendUnavailable):
        list(backend.list_keys(""))

    own_weed.restart()
    assert eventually(lambda: hits(backend, keys, MIB) == 24)
    assert eventually(lambda: hits(packed, more) == 8)
    put(packed, keys_of(8, "after"))


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "alone"])
def test_a_read_that_froze_half_way_ends_and_touches_no_page_afterwards(
    own_weed: Weed, make_backend: MakeBackend, pack: bool
) -> None:
    """Eight requests at once are in the middle of their bodies; the rest of them comes later."""
    backend = make_backend(own_weed.url, read_timeout_s=1.0, pack=pack)
    assert backend.bounds_calls()
    keys = keys_of(64, "half way")
    put(make_backend(own_weed.url, read_timeout_s=20, pack=pack), keys, MIB)
    for read in (backend.batch_get, backend.get_each):
        pages = [blank(MIB) for _ in keys]
        with frozen_at_first_byte(own_weed, pages):
            start = time.monotonic()
            with pytest.raises(BackendTimeout):
                read(keys, pages)
            assert time.monotonic() - start < 20
            for page in pages:
                page[1][:] = PATTERN
        assert eventually(lambda: hits(backend, keys, MIB) == 64)
        assert all(page[1] == PATTERN for page in pages)


@contextlib.contextmanager
def frozen_at_first_byte(server: Weed, pages: list[Page]) -> Iterator[None]:
    """Freezes the server as soon as a byte of any page has come, until the end of the block."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and all(page[1][0] == 0xEE for page in pages):
            time.sleep(1e-4)
        server.freeze()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        server.thaw()


def test_credentials_from_a_program_have_no_time_limit(
    weed: Weed, make_backend: MakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = json.dumps({"Version": 1, "AccessKeyId": KEY, "SecretAccessKey": SECRET})
    program = tmp_path / "credentials.json"
    program.write_text(said)
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = cat {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    backend = make_backend(access_key_id=None, secret_access_key=None)
    assert not backend.bounds_calls()
    put(backend, keys_of(3, "credentials of a program"))
    backend.close()
    assert not backend.bounds_calls()


def eventually(true: Callable[[], bool], limit_s: float = 20.0) -> bool:
    """Whether ``true`` becomes so; errors of a server that is coming up are waited out."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if true():
                return True
        except BackendError:
            pass
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of a certificate for 127.0.0.1 and of its key."""
    return certificate_in(tmp_path_factory.mktemp("certificate"))


def test_https_is_verified_and_carries_pages(
    certificate: tuple[Path, Path], tmp_path: Path, make_backend: MakeBackend
) -> None:
    server = Weed(tmp_path / "weed", certificate)
    try:
        with pytest.raises(BackendUnavailable, match=r"set ca_bundle"):
            make_backend(server.https_url)
        backend = make_backend(server.https_url, ca_bundle=str(certificate[0]))
        keys = keys_of(9)
        put(backend, keys, MIB)
        assert hits(backend, keys, MIB) == 9
        assert sorted(backend.list_keys("")) == sorted(keys)
    finally:
        server.close()
