"""Calls of an engine at random on a store that hangs, lies and recovers: its memory is its own."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hicache_core.integrations.foreign.staging import LentPages, Staging
from hicache_core.integrations.foreign.store import Answer
from hicache_core.testing.faults import CorruptBackend, StuckBackend
from hicache_core.types import Page
from tests.unit.integrations.foreign_world import (
    PATTERN,
    bytes_in,
    content,
    keys_of,
    memory,
    opened,
    page_of,
)
from tests.unit.storage.threads import storage_threads

NAMES = range(8)
SIZES = [100, 900, 4096, 64, 2000, 1, 3000, 500]
DEADLINE_S = 0.15
numbers = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True)


class EngineMachine(RuleBasedStateMachine):
    """An engine that uses its memory again as soon as it has an answer.

    Every page of an answered call is filled with a pattern, which must stay.
    """

    @initialize(rate=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99), direct=st.booleans())
    def open(self, rate: float, seed: int, direct: bool) -> None:
        self.threads = storage_threads()
        self.backend = memory()
        self.stuck = StuckBackend(CorruptBackend(self.backend, rate=rate, seed=seed), stuck=False)
        self.direct = direct
        self.store = opened(
            self.stuck,
            direct=direct,
            deadline_s=DEADLINE_S,
            staging_nbytes=3000,
            object_nbytes=max(SIZES),
            guarded=False,
        )
        self.lock = threading.Lock()
        self.n_open = 0
        self.wrong: list[str] = []
        self.reused: list[Page] = []
        stored = [n for n in NAMES if n % 3]
        fresh = opened(self.backend, direct=True)
        assert all(
            fresh.write(keys_of(stored), [page_of(content(n, SIZES[n])) for n in stored]).mask
        )

    def _begin(self, kind: str, names: Sequence[int]) -> tuple[list[str], list[Page]]:
        with self.lock:
            self.n_open += 1
        pages = [
            page_of(content(n, SIZES[n]) if kind == "write" else bytes(SIZES[n])) for n in names
        ]
        return keys_of(names), pages

    def _answered(self, kind: str, names: Sequence[int], pages: Sequence[Page]) -> object:
        def on_done(answer: Answer) -> None:
            if kind == "read":
                for n, page, found in zip(names, pages, answer.mask, strict=True):
                    right = content(n, SIZES[n]) if found else None
                    if found and bytes_in(page) != right:
                        self.wrong.append(f"page {n} was claimed with wrong bytes")
            for page in pages:
                for segment in page:
                    segment[:] = PATTERN * segment.nbytes
            with self.lock:
                self.reused += pages
                self.n_open -= 1

        return on_done

    @rule(names=numbers, kind=st.sampled_from(["read", "write"]))
    def submit(self, names: list[int], kind: str) -> None:
        keys, pages = self._begin(kind, names)
        submit = self.store.submit_read if kind == "read" else self.store.submit_write
        submit(keys, pages, self._answered(kind, names, pages))

    @rule(names=numbers)
    def read_while_it_hangs(self, names: list[int]) -> None:
        self.stuck.stick()
        self.submit(names, "read")
        time.sleep(1.5 * DEADLINE_S)
        self.ask(names)  # any call makes a store look at its deadlines
        self.stuck.release()

    @rule(names=numbers)
    def ask(self, names: list[int]) -> None:
        keys, _ = self._begin("exists", names)
        self.store.submit_exists(keys, self._answered("exists", names, ()))

    @rule(n=st.sampled_from(NAMES))
    def evict(self, n: int) -> None:
        self.backend.delete(keys_of([n]))

    @rule()
    def hang(self) -> None:
        self.stuck.stick()

    @rule()
    def wake(self) -> None:
        self.stuck.release()

    @rule()
    def wait_past_the_deadline(self) -> None:
        time.sleep(DEADLINE_S / 2)

    @rule()
    def until_all_is_answered(self) -> None:
        if self.direct:
            self.stuck.release()
        deadline = time.monotonic() + 20
        while self.n_open:
            assert time.monotonic() < deadline, f"{self.n_open} calls without an answer"
            time.sleep(0.002)

    @invariant()
    def memory_that_was_handed_back_stays_as_the_engine_left_it(self) -> None:
        with self.lock:
            touched = [page for page in self.reused if bytes_in(page).strip(PATTERN)]
            assert not touched
            assert not self.wrong

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.stuck.release()
        self.store.close()
        deadline = time.monotonic() + 20
        while storage_threads() - self.threads:  # calls that were given up on have ended
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert self.n_open == 0
        assert self.store.n_in_flight == 0
        self.memory_that_was_handed_back_stays_as_the_engine_left_it()
        reader = opened(self.backend, direct=True)
        into = [page_of(bytes(nbytes)) for nbytes in SIZES]
        keys = keys_of(NAMES)
        there = reader.exists(keys).mask
        assert reader.read(keys, into).mask == there, "what is stored is sealed and right"
        for n in NAMES:
            assert not there[n] or bytes_in(into[n]) == content(n, SIZES[n])
        assert sum(reader.stats().refused.values()) == 0


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)


def test_leases_never_overlap_and_all_memory_comes_back() -> None:
    staging = Staging(100_000, chunk_nbytes=20_000)
    lock = threading.Lock()
    overlaps: list[tuple[int, int]] = []
    marks = itertools.count(1)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            sizes = [rng.choice([10, 5_000, 30_000]) for _ in range(rng.randrange(1, 4))]
            with staging.lease(LentPages([page_of(bytes(n)) for n in sizes])) as room:
                with lock:
                    mark = next(marks) % 255 + 1
                room[:] = bytes([mark]) * room.nbytes
                time.sleep(0)
                if bytes(room).strip(bytes([mark])):
                    with lock:
                        overlaps.append((seed, mark))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert overlaps == []
    assert staging.held_nbytes == 0
    assert staging.n_refused == 0
