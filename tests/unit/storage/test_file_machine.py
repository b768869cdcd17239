"""Any order of calls on file backends of one directory, against a dict."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.file.records import BLOCK_NBYTES, capacity_for
from hicache_core.types import BackendContext

KEY = st.sampled_from([f"{p}/{n}" for p in "ab" for n in range(5)])
KEYS = st.lists(KEY, max_size=6)
SIZES = st.sampled_from([0, 1, 700, 3824, 3825, 9000])
WHICH = st.integers(0, 1)
TTL_S = 100.0


def value(key: str, nbytes: int) -> bytes:
    return (key.encode() * (nbytes // len(key) + 1))[:nbytes]


class FileMachine(RuleBasedStateMachine):
    """Two backends, as two processes would have; what one does the other must see.

    The model is a dict of what was stored and not removed. Below a cap an object may be evicted, so
    there the backend may hold less than the model, never more and never other bytes. Without a cap
    they are equal.
    """

    @initialize(cap=st.sampled_from([None, 4, 9]), sizes_differ=st.booleans())
    def start(self, cap: int | None, sizes_differ: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hicache-test-"))
        self.now = 1_000_000.0
        self.cap = None if cap is None else cap * BLOCK_NBYTES
        self.sizes_differ = sizes_differ
        self.model: dict[str, tuple[int, float]] = {}
        self.backends = [self._open(), self._open()]

    def _open(self) -> FileBackend:
        config = FileConfig(
            path=self.directory / "store", max_nbytes=self.cap or 1 << 30, ttl_s=TTL_S, io_threads=1
        )
        backend = FileBackend(config, BackendContext(namespace="0" * 16), lambda: self.now)
        backend.open()
        return backend

    def _expect(self, key: str) -> int | None:
        """Length of the object that may be under ``key``."""
        nbytes, written_at = self.model.get(key, (None, 0.0))
        return None if nbytes is None or written_at <= self.now - TTL_S else nbytes

    @rule(which=WHICH, keys=KEYS, nbytes=SIZES)
    def put(self, which: int, keys: Sequence[str], nbytes: int) -> None:
        keys = list(dict.fromkeys(keys))
        nbytes = nbytes if self.sizes_differ else 700
        pages = [[memoryview(value(key, nbytes))] for key in keys]
        there = {key for key in keys if self.backends[which].exists(key)}
        n_stored = self.backends[which].batch_set(keys, pages)
        fits = capacity_for(nbytes) <= (self.cap or 1 << 30)
        assert n_stored == len(keys) or self.cap is not None
        assert n_stored > 0 or not keys or not fits or there  # what is there makes no room
        for key in keys[:n_stored]:
            if key not in there or self._expect(key) != nbytes:
                self.model[key] = (nbytes, self.now)
        for key in keys[n_stored:]:
            if self._expect(key) != nbytes:
                self.model.pop(key, None)
        assert self.backends[which].batch_exists(keys) >= n_stored

    @rule(which=WHICH, sizes=st.dictionaries(KEY, SIZES, max_size=6))
    def put_each(self, which: int, sizes: dict[str, int]) -> None:
        if not self.sizes_differ:
            sizes = dict.fromkeys(sizes, 700)
        backend, keys = self.backends[which], list(sizes)
        there = {key for key in keys if backend.exists(key) and self._expect(key) == sizes[key]}
        mask = backend.set_each(keys, [[memoryview(value(*item))] for item in sizes.items()])
        for key, is_stored in zip(keys, mask, strict=True):
            assert is_stored or (self.cap is not None and key not in there)
            if is_stored and key not in there:
                self.model[key] = (sizes[key], self.now)
            elif not is_stored and self._expect(key) != sizes[key]:
                self.model.pop(key, None)
        present = backend.exists_each(keys)
        assert all(now for now, is_stored in zip(present, mask, strict=True) if is_stored)

    @rule(which=WHICH, keys=KEYS, nbytes=SIZES)
    def read_each(self, which: int, keys: Sequence[str], nbytes: int) -> None:
        """Objects of ``nbytes`` are read, and are right; others are not."""
        pages = [[memoryview(bytearray(nbytes))] for _ in keys]
        mask = self.backends[which].get_each(keys, pages)
        for key, (page,), is_filled in zip(keys, pages, mask, strict=True):
            if is_filled:
                assert self._expect(key) == nbytes
                assert page == value(key, nbytes)
            else:
                assert self._expect(key) != nbytes or self.cap is not None

    @rule(which=WHICH, keys=KEYS)
    def exists_each(self, which: int, keys: Sequence[str]) -> None:
        mask = self.backends[which].exists_each(keys)
        held = [self._expect(key) is not None for key in keys]
        assert list(mask) == held or self.cap is not None
        assert all(expected for expected, found in zip(held, mask, strict=True) if found)

    @rule(which=WHICH, keys=KEYS)
    def read(self, which: int, keys: Sequence[str]) -> None:
        for key in keys:
            found = self.backends[which].get(key)
            expected = self._expect(key)
            if found is not None:
                assert expected == len(found)
                assert bytes(found) == value(key, len(found))
            else:
                assert expected is None or self.cap is not None

    @rule(which=WHICH, keys=KEYS)
    def exists(self, which: int, keys: Sequence[str]) -> None:
        n = self.backends[which].batch_exists(keys)
        assert all(self._expect(key) is not None for key in keys[:n])
        if self.cap is None and n < len(keys):
            assert self._expect(keys[n]) is None

    @rule(which=WHICH, keys=KEYS)
    def delete(self, which: int, keys: Sequence[str]) -> None:
        self.backends[which].delete(keys)
        for key in keys:
            self.model.pop(key, None)

    @rule(which=WHICH, prefix=st.sampled_from(["", "a", "a/", "b/3", "c"]))
    def clear(self, which: int, prefix: str) -> None:
        self.backends[which].clear(prefix)
        self.model = {k: v for k, v in self.model.items() if not k.startswith(prefix)}

    @rule(seconds=st.sampled_from([0.5, 30.0, 120.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(which=WHICH)
    def reopen(self, which: int) -> None:
        self.backends[which].close()
        self.backends[which] = self._open()

    @rule()
    def lose_the_index(self) -> None:
        """The index is built anew from the headers; removed objects may come back, whole."""
        for backend in self.backends:
            backend.close()
        if self.cap is None:
            before = sorted(self.model)
            (self.directory / "store" / "index.sqlite").unlink()
            self.backends = [self._open(), self._open()]
            for key in self.backends[0].list_keys(""):
                if key not in self.model:
                    self.backends[0].delete([key])
            assert [key for key in before if self._expect(key) is not None] == sorted(
                self.backends[0].list_keys("")
            )
        else:
            self.backends = [self._open(), self._open()]

    @invariant()
    def sums_hold(self) -> None:
        if not hasattr(self, "backends"):
            return
        for backend in self.backends:
            backend.check_integrity()
            stats = backend.stats()
            assert stats["held_nbytes"] <= stats["max_nbytes"]
            assert set(backend.list_keys("")) <= set(self.model)

    def teardown(self) -> None:
        if hasattr(self, "backends"):
            for backend in self.backends:
                backend.close()
            shutil.rmtree(self.directory)


TestFileMachine = FileMachine.TestCase
TestFileMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
