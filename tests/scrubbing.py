"""What scrubbing must do on any backend that lists and deletes; the plugins' tests use it."""

from __future__ import annotations

from hicache_core.storage.base import StorageBackend
from hicache_core.storage.scrub import scrub
from hicache_core.storage.sealed import seal


def sealed(key: str) -> bytes:
    """A page of the cache as it is stored."""
    page = (memoryview(bytearray(64)), memoryview(bytearray(b"payload" * 700)))
    seal(key, page)
    return b"".join(page)


def check_scrub(backend: StorageBackend, good: str, corrupt: str, foreign: str) -> None:
    """Scrubbing leaves the good page, and no other; a second time there is nothing to do."""
    backend.set(good, sealed(good))
    backend.set(corrupt, sealed(corrupt)[:-1] + b"!")
    backend.set(foreign, sealed(good))
    kinds = {checked.key: checked.kind for checked in scrub(backend)}
    assert kinds == {good: "good", corrupt: "corrupt", foreign: "foreign"}
    assert [backend.exists(key) for key in (good, corrupt, foreign)] == [True, False, False]
    assert {checked.key: checked.kind for checked in scrub(backend)} == {good: "good"}
