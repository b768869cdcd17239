"""TTL, quota and pins of the memory and the file backend, against a model that is a plain dict."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hicache_core.errors import BackendFull
from hicache_core.storage.base import Pins, ReportsUsage
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.file.records import BLOCK_NBYTES
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext

CONTEXT = BackendContext(namespace="0" * 16)
NBYTES = 100  # one block of the file backend
KEYS = [f"{namespace}/{n}" for namespace in "abc" for n in range(4)]


class Clock:
    """Time that a test sets."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Entry:
    """What the model knows of an object."""

    written: float
    used: float
    pinned_until: float = 0.0


class Model:
    """What is there, by the rules alone: equal objects, one call after the other."""

    def __init__(
        self, cap: int | None, quota: int | None, ttl_s: float | None, *, rewrites: bool
    ) -> None:
        self.cap, self.quota, self.ttl_s, self.rewrites = cap, quota, ttl_s, rewrites
        self.entries: dict[str, Entry] = {}

    def expire(self, now: float) -> None:
        if self.ttl_s is not None:
            ttl_s = self.ttl_s
            self.entries = {k: e for k, e in self.entries.items() if now - e.written < ttl_s}

    def put(self, key: str, now: float) -> None:
        entry = self.entries.pop(key, None)
        own = [k for k in self.entries if k[0] == key[0]]
        if self.quota is not None and len(own) + 1 > self.quota:
            self.evict(own, now)
        if self.cap is not None and len(self.entries) + 1 > self.cap:
            self.evict(list(self.entries), now)
        written = now if entry is None or self.rewrites else entry.written
        pinned_until = entry.pinned_until if entry else 0.0
        self.entries[key] = Entry(written, now, pinned_until)

    def evict(self, keys: list[str], now: float) -> None:
        keys.sort(key=lambda k: (self.entries[k].pinned_until > now, self.entries[k].used))
        del self.entries[keys[0]]

    def pin(self, keys: list[str], ttl_s: float, now: float) -> int:
        present = [key for key in keys if key in self.entries]
        for key in present:
            self.entries[key].pinned_until = now + ttl_s if ttl_s else 0.0
        return len(present)


class RetentionMachine(RuleBasedStateMachine):
    """One backend and the model; every call takes a second, so that no two uses are at once."""

    @initialize(
        kind=st.sampled_from(["memory", "file"]),
        cap=st.sampled_from([None, 3, 7]),
        quota=st.sampled_from([None, 1, 3]),
        ttl_s=st.sampled_from([None, 12.0]),
    )
    def start(self, kind: str, cap: int | None, quota: int | None, ttl_s: float | None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hicache-test-"))
        self.clock = Clock()
        # The file backend looks for what is too old now and then only: see test_file_machine.
        self.ttl_s = ttl_s if kind == "memory" else None
        self.kind, self.cap, self.quota = kind, cap, quota
        self.model = Model(cap, quota, self.ttl_s, rewrites=kind == "memory")
        self.backend = self.opened()

    def opened(self) -> MemoryBackend | FileBackend:
        asked: dict[str, object] = {
            "namespace_quota_nbytes": self.quota and self.quota * NBYTES,
            "ttl_s": self.ttl_s,
        }
        backend: MemoryBackend | FileBackend
        if self.kind == "memory":
            asked["max_nbytes"] = self.cap and self.cap * NBYTES
            backend = MemoryBackend(MemoryConfig.model_validate(asked), CONTEXT, self.clock)
        else:
            asked |= {"max_nbytes": self.cap and self.cap * BLOCK_NBYTES, "io_threads": 1}
            config = FileConfig.model_validate(asked | {"path": self.directory / "store"})
            backend = FileBackend(config, CONTEXT, self.clock)
        backend.open()
        return backend

    def tick(self, seconds: float = 1.0) -> float:
        self.clock.now += seconds
        self.model.expire(self.clock.now)
        return self.clock.now

    @rule(key=st.sampled_from(KEYS))
    def put(self, key: str) -> None:
        now = self.tick()
        self.backend.set(key, key.encode().ljust(NBYTES))
        self.model.put(key, now)

    @rule(key=st.sampled_from(KEYS))
    def get(self, key: str) -> None:
        now = self.tick()
        found = self.backend.get(key)
        assert (found is not None) == (key in self.model.entries)
        if found is not None:
            assert bytes(found) == key.encode().ljust(NBYTES)
            self.model.entries[key].used = now

    @rule(
        keys=st.lists(st.sampled_from(KEYS), unique=True), ttl_s=st.sampled_from([0.0, 3.0, 20.0])
    )
    def pin(self, keys: list[str], ttl_s: float) -> None:
        now = self.tick()
        assert self.backend.pin(keys, ttl_s) == self.model.pin(keys, ttl_s, now)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def delete(self, keys: list[str]) -> None:
        self.tick()
        self.backend.delete(keys)
        for key in keys:
            self.model.entries.pop(key, None)

    @rule(seconds=st.sampled_from([2.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.tick(seconds)

    @precondition(lambda self: self.kind == "file")
    @rule()
    def reopen(self) -> None:
        self.backend.close()
        self.backend = self.opened()

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "backend"):
            return
        assert sorted(self.backend.list_keys("")) == sorted(self.model.entries)
        n_in = Counter(key[0] for key in self.model.entries)
        assert self.backend.usage() == {namespace: n * NBYTES for namespace, n in n_in.items()}
        if isinstance(self.backend, FileBackend):
            self.backend.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "backend"):
            self.backend.close()
            shutil.rmtree(self.directory)


TestRetention = RetentionMachine.TestCase
TestRetention.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

Opened = Callable[..., MemoryBackend | FileBackend]


@pytest.fixture(params=["memory", "file"])
def opened(request: pytest.FixtureRequest) -> Opened:
    """Opens a backend of either kind."""
    if request.param == "file":
        open_file: Callable[..., FileBackend] = request.getfixturevalue("open_file")
        return open_file

    def open_memory(**asked: object) -> MemoryBackend:
        backend = MemoryBackend(MemoryConfig.model_validate(asked), CONTEXT, Clock())
        backend.open()
        return backend

    return open_memory


def page(nbytes: int) -> list[memoryview]:
    return [memoryview(bytearray(nbytes))]


def test_it_can_pin_and_report_its_usage(opened: Opened) -> None:
    backend = opened()
    assert isinstance(backend, Pins)
    assert isinstance(backend, ReportsUsage)
    assert backend.usage() == {}


def test_an_object_above_the_quota_is_dropped_and_evicts_nothing(opened: Opened) -> None:
    backend = opened(namespace_quota_nbytes=300)
    backend.set("a/1", bytes(200))
    with pytest.raises(BackendFull):
        backend.set("a/2", bytes(301))
    assert backend.batch_set(["a/3"], [page(301)]) == 0
    assert list(backend.list_keys("")) == ["a/1"]
    assert backend.stats()["dropped_writes"] == 2


def test_objects_of_many_lengths_keep_within_the_quota(opened: Opened) -> None:
    backend = opened(namespace_quota_nbytes=10_000)
    backend.set("b/1", bytes(9_000))
    for n in range(40):
        backend.set(f"a/{n}", bytes(137 * n))
        assert backend.exists(f"a/{n}")
        assert backend.usage().get("a", 0) <= 10_000
    assert backend.exists("b/1")
    assert backend.usage()["b"] == 9_000
    assert backend.usage()["a"] > 0


def test_what_is_stored_again_counts_once(opened: Opened) -> None:
    backend = opened(namespace_quota_nbytes=300)
    for _ in range(3):
        assert backend.batch_set(["a/1", "a/2"], [page(150), page(150)]) == 2
    assert backend.usage() == {"a": 300}
    assert backend.batch_exists(["a/1", "a/2"]) == 2


def test_a_full_store_passes_over_what_is_pinned(opened: Opened) -> None:
    backend = opened(max_nbytes=4 * BLOCK_NBYTES)
    nbytes = BLOCK_NBYTES - 272  # what the file backend adds to an object
    keys = [f"a/{n}" for n in range(4)]
    for key in keys:
        backend.set(key, bytes(nbytes))
    assert backend.pin(keys[:2], 60.0) == 2
    for n in range(10):
        backend.set(f"b/{n}", bytes(nbytes))
    assert backend.batch_exists(keys) == 2


def test_pinned_objects_expire_as_others(opened: Opened) -> None:
    backend = opened(ttl_s=10)
    backend.set("a/1", b"x")
    backend.pin(["a/1"], 1000.0)
    backend._clock.now += 10  # type: ignore[attr-defined]
    assert not backend.exists("a/1")
    assert backend.pin(["a/1"], 1000.0) == 0
