"""Scrubbing finds what is wrong, removes what nobody can use, and never a good object."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import BackendError
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.scrub import (
    KINDS,
    REMOVED,
    UNKNOWN,
    ScrubResult,
    ScrubTotals,
    classify,
    scrub,
)
from hicache_core.storage.sealed import HEADER_NBYTES, seal
from hicache_core.types import BackendContext, Page

CONTEXT = BackendContext(namespace="0" * 16)
NAMESPACES = ("a" * 16, "b" * 16)


def memory() -> MemoryBackend:
    backend = MemoryBackend(MemoryConfig(), CONTEXT)
    backend.open()
    return backend


def key_of(n: int, namespace: str = NAMESPACES[0]) -> str:
    return f"{namespace}/{hashlib.sha256(str(n).encode()).hexdigest()}"


def sealed(key: str, nbytes: int = 100) -> bytearray:
    """The good object under ``key``."""
    data = bytearray(HEADER_NBYTES + nbytes)
    data[HEADER_NBYTES:] = (key.encode() * (nbytes // len(key) + 1))[:nbytes]
    seal(key, (memoryview(data)[:HEADER_NBYTES], memoryview(data)[HEADER_NBYTES:]))
    return data


def flipped(key: str, nbytes: int, offset: int) -> bytearray:
    data = sealed(key, nbytes)
    data[offset] ^= 1
    return data


MADE: dict[str, Callable[[str, int], bytearray]] = {
    "good": sealed,
    "corrupt": lambda key, nbytes: flipped(key, nbytes, HEADER_NBYTES + nbytes - 1),
    "foreign": lambda key, nbytes: sealed(key[:-4] + "0000", nbytes),
    "wrong_length": lambda key, nbytes: sealed(key, nbytes)[:-1],
    "wrong_version": lambda key, nbytes: flipped(key, nbytes, 4),
    "unknown": lambda key, nbytes: bytearray(b"HiS3".ljust(nbytes, b"?")),
}
"""Objects of every kind but ``vanished``; each needs at least one byte of payload."""

OBJECTS = st.lists(
    st.tuples(
        st.sampled_from(sorted(MADE)), st.sampled_from([1, 100, 300]), st.sampled_from(NAMESPACES)
    ),
    max_size=30,
)


@given(objects=OBJECTS, batch_nbytes=st.sampled_from([1, 500, 1 << 20]))
def test_every_object_is_judged_and_what_is_bad_is_removed(
    objects: list[tuple[str, int, str]], batch_nbytes: int
) -> None:
    backend, made = memory(), {}
    for n, (kind, nbytes, namespace) in enumerate(objects):
        key = key_of(n, namespace)
        backend.set(key, MADE[kind](key, nbytes))
        made[key] = kind
    seen = list(scrub(backend, remove=False, batch_nbytes=batch_nbytes))
    assert {checked.key: checked.kind for checked in seen} == made
    assert not any(checked.removed for checked in seen)
    assert set(backend.list_keys("")) == set(made)
    removed = {c.key for c in scrub(backend, batch_nbytes=batch_nbytes) if c.removed}
    assert removed == {key for key, kind in made.items() if kind in REMOVED}
    assert set(backend.list_keys("")) == set(made) - removed
    assert not any(checked.removed for checked in scrub(backend))
    told = {c.key for c in scrub(backend, kinds=REMOVED | {UNKNOWN}) if c.removed}
    assert told == {key for key, kind in made.items() if kind == UNKNOWN}


def test_an_empty_payload_and_other_keys_are_judged_too() -> None:
    key = key_of(1)
    assert classify(key, sealed(key, 0)) == "good"
    assert classify(key, b"HiCP") == "wrong_length"
    assert classify(key, b"") == "unknown"
    assert classify(key, bytes(100)) == "unknown"
    assert classify(key, None) == "vanished"
    assert classify("some/other", sealed(key)) == "unknown"


def test_only_what_was_asked_for_is_checked() -> None:
    backend = memory()
    for n in range(6):
        key = key_of(n, NAMESPACES[n % 2])
        backend.set(key, sealed(key))
    checked = list(scrub(backend, prefix=f"{NAMESPACES[1]}/"))
    assert {c.key for c in checked} == {key_of(n, NAMESPACES[1]) for n in (1, 3, 5)}
    assert len(list(scrub(backend, limit=4))) == 4


class Meddler(MemoryBackend):
    """A store in which others write and delete between any two reads of a key."""

    between: Callable[[str], None] | None = None

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        if self.between is not None:
            self.between(key)
        return value

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_filled = super().batch_get(keys, pages)
        for key in keys:
            if self.between is not None:
                self.between(key)
        return n_filled


def meddled() -> Meddler:
    backend = Meddler(MemoryConfig(), CONTEXT)
    backend.open()
    for n in range(8):
        backend.set(key_of(n), flipped(key_of(n), 100, 70))
    return backend


def test_an_object_that_is_overwritten_meanwhile_stays() -> None:
    backend = meddled()
    backend.between = lambda key: backend.set(key, sealed(key))
    assert {checked.kind for checked in scrub(backend)} == {"good"}
    assert len(list(backend.list_keys(""))) == 8


def test_an_object_that_is_spoilt_on_its_way_stays() -> None:
    backend = meddled()
    flips = itertools.count(HEADER_NBYTES)
    backend.between = lambda key: backend.set(key, flipped(key, 100, next(flips)))
    assert {(checked.kind, checked.removed) for checked in scrub(backend)} == {("corrupt", False)}
    assert len(list(backend.list_keys(""))) == 8


def test_an_object_that_goes_meanwhile_has_vanished() -> None:
    backend = meddled()
    backend.between = lambda key: backend.delete([key])
    checked = list(scrub(backend))
    assert {c.kind for c in checked} == {"vanished"}
    assert [c.nbytes for c in checked] == [0] * 8


class Measured(MemoryBackend):
    """Counts its calls, and how many bytes a call moves."""

    def open(self) -> None:
        super().open()
        self.most_nbytes = self.n_gets = self.n_batches = 0

    def get(self, key: str) -> Buffer | None:
        self.n_gets += 1
        return super().get(key)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self.n_batches += 1
        self.most_nbytes = max(self.most_nbytes, sum(len(s) for page in pages for s in page))
        # Not through self.get: that counts singles.
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            value = super().get(key)
            if value is None or len(value) != len(page[0]):
                return n
            page[0][:] = value
        return len(keys)


def test_it_reads_in_batches_within_its_memory() -> None:
    backend = Measured(MemoryConfig(), CONTEXT)
    backend.open()
    for n in range(500):
        backend.set(key_of(n), sealed(key_of(n), 1000))
    assert len(list(scrub(backend, batch_nbytes=50 * 1064))) == 500
    assert backend.n_gets < 5
    assert backend.n_batches < 20
    assert backend.most_nbytes <= 50 * 1064


def test_objects_of_changing_length_cost_no_more_than_a_few_reads_each() -> None:
    backend = Measured(MemoryConfig(), CONTEXT)
    backend.open()
    for n in range(100):
        backend.set(key_of(n), sealed(key_of(n), 100 + n % 2))
    assert {checked.kind for checked in scrub(backend)} == {"good"}
    assert backend.n_gets + backend.n_batches <= 200


class Bare(StorageBackend):
    """Neither lists nor deletes."""

    name = "bare"
    n_deleted = 0

    def get(self, key: str) -> Buffer | None:
        return None

    def exists(self, key: str) -> bool:
        return False

    def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError


class Listed(Bare):
    """Lists, and deletes nothing."""

    name = "listed"

    def list_keys(self, prefix: str) -> Iterator[str]:
        """One key that is not there."""
        return iter([key_of(1)])


def test_what_a_backend_cannot_do_is_said_before_anything_is_read() -> None:
    with pytest.raises(BackendError, match="'bare' cannot list its keys"):
        scrub(Bare(BackendConfig(), CONTEXT))
    listed = Listed(BackendConfig(), CONTEXT)
    with pytest.raises(BackendError, match="cannot delete; use --dry-run"):
        scrub(listed)
    assert list(scrub(listed, remove=False)) == [ScrubResult(key_of(1), "vanished", 0)]


def test_the_sums_are_by_namespace_and_kind() -> None:
    totals = ScrubTotals()
    for checked in (
        ScrubResult(key_of(1), "good", 100),
        ScrubResult(key_of(2), "good", 50),
        ScrubResult(key_of(3, NAMESPACES[1]), "corrupt", 7, removed=True),
        ScrubResult("alien/x", "foreign", 1),
        ScrubResult("other", "foreign", 2),
        ScrubResult(key_of(4), "wrong_version", 3),
    ):
        totals.add(checked)
    assert totals.by_namespace() == {
        "": {"foreign": {"objects": 2, "nbytes": 3}},
        NAMESPACES[0]: {
            "good": {"objects": 2, "nbytes": 150},
            "wrong_version": {"objects": 1, "nbytes": 3},
        },
        NAMESPACES[1]: {"corrupt": {"objects": 1, "nbytes": 7}},
    }
    assert (totals.n_bad, totals.n_removed) == (3, 1)
    assert {kind for _, kind in totals.objects} <= set(KINDS)


def test_a_damaged_file_store_is_clean_afterwards(open_file: Callable[..., FileBackend]) -> None:
    backend = open_file()
    keys = [key_of(n) for n in range(20)]
    for n, key in enumerate(keys):
        backend.set(key, sealed(key, 5000) if n % 4 else flipped(key, 5000, 99))
    assert sum(checked.removed for checked in scrub(backend)) == 5
    assert sorted(backend.list_keys("")) == sorted(k for n, k in enumerate(keys) if n % 4)
    assert {checked.kind for checked in scrub(backend)} == {"good"}
    backend.check_integrity()
