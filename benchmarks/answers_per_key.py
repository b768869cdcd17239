"""What answers per key cost: native, and by the default that asks again behind each gap.

All go through the guard and the seal to the file backend. Rows that are compared take turns.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import Row, measure
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page

N_KEYS = 128
PAGE_NBYTES = 1 << 16

Calls = dict[str, Callable[[], object]]


def rows(quick: bool) -> Iterator[Row]:
    """Questions for absent keys and for every second key, reads of every second page, stores."""
    repeat = 5 if quick else 15
    directory = Path(tempfile.mkdtemp(prefix="hicache-bench-"))
    inner = FileBackend(FileConfig(path=directory / "store"), BackendContext(namespace="0" * 16))
    # No failed keys are remembered: they would not be asked for.
    backend = GuardedBackend(SealedBackend(inner), GuardConfig(negative_max_keys=0))
    backend.open()
    try:
        yield from _rows(backend, repeat)
    finally:
        backend.close()
        shutil.rmtree(directory)


def _rows(backend: StorageBackend, repeat: int) -> Iterator[Row]:
    stored, absent = _keys(0), _keys(N_KEYS)
    gaps = [key for pair in zip(stored[: N_KEYS // 2], absent, strict=False) for key in pair]
    pages = _pages()
    if not all(backend.set_each(stored, pages)):
        raise RuntimeError("the backend dropped pages")
    default = StorageBackend
    table = f"answers per key: guard, seal and file, {N_KEYS}"
    yield from _in_turn(
        f"{table} absent keys",
        {
            "exists_each": lambda: backend.exists_each(absent),
            "the default: exists_each": lambda: default.exists_each(backend, absent),
        },
        repeat,
        target="≤ 1,000 us",
    )
    yield from _in_turn(
        f"{table} keys, every second one absent",
        {
            "exists_each": lambda: backend.exists_each(gaps),
            "the default: exists_each": lambda: default.exists_each(backend, gaps),
        },
        repeat,
    )
    yield from _in_turn(
        f"{table} pages of 64 KiB, every second one absent",
        {
            "get_each": lambda: backend.get_each(gaps, pages),
            "the default: get_each": lambda: default.get_each(backend, gaps, pages),
        },
        repeat,
    )
    yield from _in_turn(
        f"{table} pages of 64 KiB, all there",
        {
            "batch_get": lambda: backend.batch_get(stored, pages),
            "get_each": lambda: backend.get_each(stored, pages),
            "batch_set, stored already": lambda: backend.batch_set(stored, pages),
            "set_each, stored already": lambda: backend.set_each(stored, pages),
        },
        repeat,
    )


def _in_turn(table: str, calls: Calls, repeat: int, target: str | None = None) -> Iterator[Row]:
    """Microseconds of each call; one sample of each, again and again."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _, (name, call) in itertools.product(range(repeat), calls.items()):
        for kept, new in zip(samples[name], measure(call, repeat=1, number=3), strict=True):
            kept += [seconds * 1e6 for seconds in new]
    first = next(iter(calls))
    for name, (wall, cpu) in samples.items():
        baseline = None if name == first else first
        yield Row(table, name, "us a call", wall, cpu, baseline, target if name == first else None)


def _keys(start: int) -> list[str]:
    return [f"{0:016x}/{n:064x}" for n in range(start, start + N_KEYS)]


def _pages() -> list[Page]:
    memory = memoryview(bytearray(os.urandom(N_KEYS * PAGE_NBYTES)))
    return [
        (memoryview(bytearray(HEADER_NBYTES)), memory[n * PAGE_NBYTES : (n + 1) * PAGE_NBYTES])
        for n in range(N_KEYS)
    ]
