"""Clients of one store side by side: they write and read the same pages in turn.

The benchmark of a backend says who they are and starts the store; what is measured, and how, is the
same for every backend.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.harness import Row, measure
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.types import Page

NAMESPACE = "0123456789abcdef"
SIZES = {"256 KiB": 1 << 18, "1 MiB": 1 << 20, "4 MiB": 1 << 22, "8 MiB": 1 << 23}
N_PAGES = 128
WORKERS = (1, 4)

Work = Callable[[Sequence[int]], object]
"""Writes, or reads, the pages of the given numbers."""
Samples = tuple[list[float], list[float]]
"""Seconds by wall clock and by CPU time, one of each a repetition."""


@dataclass(frozen=True)
class Contender:
    """A client of the store.

    Attributes:
        name: of its rows.
        read: reads pages; each call names a stretch of the batch.
        write: writes pages; None for another way to read what a contender before it has written.
        clean: called behind each of its turns.
        splits: whether it divides a batch among threads of its own.
        baseline: whom it is compared with, if not with the baseline of the contest.
        target: of its throughput, in words.
        hit_target: of its latency, in words.
    """

    name: str
    read: Work
    write: Work | None = None
    clean: Callable[[], object] = lambda: None
    splits: bool = False
    baseline: str | None = None
    target: str | None = None
    hit_target: str | None = None


@dataclass(frozen=True)
class Contest:
    """Contenders on one store, and the batch that they move.

    Attributes:
        store: begins the titles of the tables.
        size: of a page, in words.
        nbytes: of a page.
        n_pages: of the batch.
        contenders: who takes part.
        baseline: name of the one that the others are compared with.
        before_turn: called with the number of each turn.
        n_warm_up: so many turns are not counted: they open connections and touch memory.
    """

    store: str
    size: str
    nbytes: int
    n_pages: int
    contenders: Sequence[Contender]
    baseline: str
    before_turn: Callable[[int], object] = lambda _: None
    n_warm_up: int = 1

    def throughput(self, n_workers: int, n_turns: int) -> Iterator[Row]:
        """MB/s of writing and of reading the batch by so many workers."""
        samples: dict[tuple[str, str], Samples] = {}
        with ThreadPoolExecutor(n_workers) as pool:
            for turn in range(self.n_warm_up + n_turns):
                self.before_turn(turn)
                for who in self.contenders:
                    for verb, work in (("write", who.write), ("read", who.read)):
                        if work is not None:
                            n_parts = 1 if who.splits else n_workers
                            took = measure(partial(self._split, work, n_parts, pool), repeat=1)
                            if turn >= self.n_warm_up:
                                _add(samples.setdefault((verb, who.name), ([], [])), took)
                    who.clean()
        megabytes = self.n_pages * self.nbytes / 1e6
        for verb in ("read", "write"):
            title = f"{self.store} {verb}: {self.n_pages} pages of {self.size}"
            by = "1 worker" if n_workers == 1 else f"{n_workers} workers"
            for who in self.contenders:
                if (verb, who.name) in samples:
                    wall, cpu = (
                        [megabytes / max(s, 1e-9) for s in seconds]
                        for seconds in samples[verb, who.name]
                    )
                    yield self._row(f"{title}, {by}", who, "MB/s", (wall, cpu), who.target)

    def latency(self, n_turns: int, number: int) -> Iterator[Row]:
        """Microseconds of a hit of the batch's first page; a sample is the mean of some calls.

        Args:
            n_turns: samples of each contender.
            number: calls of a sample.
        """
        for who in self.contenders:
            if who.write is not None:
                who.write(range(self.n_pages))
        calls = {who.name: partial(who.read, [0]) for who in self.contenders}
        found = in_turns(calls, n_turns, number)
        for who in self.contenders:
            who.clean()
            title = f"{self.store}: a hit of one page of {self.size}"
            yield self._row(title, who, "us", _times(found[who.name], 1e6), who.hit_target)

    def _split(self, work: Work, n_parts: int, pool: ThreadPoolExecutor) -> None:
        """The batch by so many workers, each a stretch of it."""
        if n_parts == 1:
            work(range(self.n_pages))
            return
        size = -(-self.n_pages // n_parts)
        starts = range(0, self.n_pages, size)
        list(pool.map(work, [range(n, min(self.n_pages, n + size)) for n in starts]))

    def _row(
        self, table: str, who: Contender, unit: str, samples: Samples, target: str | None
    ) -> Row:
        other = who.baseline or self.baseline
        return Row(table, who.name, unit, *samples, None if other == who.name else other, target)


def in_turns(
    calls: Mapping[str, Callable[[], object]], n_turns: int, number: int = 1
) -> dict[str, Samples]:
    """One sample of each call after the other, so that the machine's noise meets them alike."""
    samples: dict[str, Samples] = {name: ([], []) for name in calls}
    for _ in range(n_turns):
        for name, call in calls.items():
            _add(samples[name], measure(call, repeat=1, number=number))
    return samples


def exists_rows(
    table: str, calls: Mapping[str, Callable[[], object]], n_keys: int, n_turns: int
) -> Iterator[Row]:
    """Microseconds for each key of a question; the first call is the baseline."""
    baseline = next(iter(calls))
    for name, samples in in_turns(calls, n_turns).items():
        base = None if name == baseline else baseline
        yield Row(table, name, "us", *_times(samples, 1e6 / n_keys), base)


def gap_rows(
    store: str, backend: StorageBackend, pages: Sequence[Page], n_turns: int
) -> Iterator[Row]:
    """Microseconds for each key of a batch with gaps: asked at once, and again behind each gap.

    Args:
        store: begins the titles of the tables.
        backend: holds none of the batch yet.
        pages: of the batch; what they hold is stored under every second key.
        n_turns: samples of each call.
    """
    absent, keys = keys_of("absent", len(pages)), keys_of("gaps", len(pages))
    there = [n % 2 == 0 for n in range(len(pages))]
    expect(backend.batch_set(keys[::2], pages[::2]), len(keys[::2]))

    def calls(
        keys: Sequence[str], found: Sequence[bool]
    ) -> Mapping[str, Mapping[str, Callable[[], object]]]:
        again = StorageBackend
        return {
            "exists": {
                "at once": lambda: expect(list(backend.exists_each(keys)), found),
                "again behind each gap": lambda: expect(again.exists_each(backend, keys), found),
            },
            "read": {
                "at once": lambda: expect(list(backend.get_each(keys, pages)), found),
                "again behind each gap": lambda: expect(
                    again.get_each(backend, keys, pages), found
                ),
            },
        }

    for what, names, found in (
        ("absent", absent, [False] * len(pages)),
        ("every second absent", keys, there),
    ):
        for verb, ways in calls(names, found).items():
            table = f"{store} {verb}, for each of {len(pages)} keys, {what}"
            yield from exists_rows(table, ways, len(pages), n_turns)


def backend_contender(
    name: str,
    backend: StorageBackend,
    keys: Callable[[], Sequence[str]],
    pages: Sequence[Page],
    **more: Any,
) -> Contender:
    """A backend of ours, by ``batch_get`` and ``batch_set``; ``more`` as in ``Contender``."""

    def move(call: Callable[[Sequence[str], Sequence[Page]], int], part: Sequence[int]) -> None:
        names = keys()
        expect(call([names[n] for n in part], [pages[n] for n in part]), len(part))

    return Contender(
        name, partial(move, backend.batch_get), partial(move, backend.batch_set), **more
    )


def expect(found: object, wanted: object) -> None:
    """A benchmark of calls that fail is worth nothing."""
    if found != wanted:
        raise SystemExit(f"{found!r} instead of {wanted!r}")


def keys_of(kind: str, n_pages: int) -> list[str]:
    """Keys of a batch; ``kind`` keeps the contenders apart."""
    return [f"{NAMESPACE}/{kind.encode().hex():0>32}{n:032x}" for n in range(n_pages)]


def new_memory(nbytes: int) -> memoryview:
    """Zeros and ones in pages of the system that were touched."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    memory[::4096] = b"\x01" * len(memory[::4096])
    return memory


def pages_in(memory: memoryview, n_pages: int, nbytes: int) -> list[Page]:
    """Pages as the host pool makes them: headers in a side array behind the payloads."""
    headers = memory[n_pages * nbytes :]
    return [
        (
            headers[n * HEADER_NBYTES : (n + 1) * HEADER_NBYTES],
            memory[n * nbytes : (n + 1) * nbytes],
        )
        for n in range(n_pages)
    ]


def _add(samples: Samples, took: Samples) -> None:
    for have, more in zip(samples, took, strict=True):
        have.extend(more)


def _times(samples: Samples, factor: float) -> Samples:
    wall, cpu = samples
    return [s * factor for s in wall], [s * factor for s in cpu]
