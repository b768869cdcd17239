"""Taking and giving back the pages of 1,024 tokens."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

from benchmarks.harness import Row, measure
from hicache_core.pools.allocator import PageAllocator

N_TOKENS = 1024
N_CALLS = 500


def rows(quick: bool) -> Iterator[Row]:
    """``allocate`` and ``free``, each by itself, in a pool whose free pages are shuffled."""
    repeat = 5 if quick else 21
    for page_size in (64, 16, 1):
        n = N_TOKENS // page_size
        allocator = PageAllocator(2 * N_CALLS * n)
        pages = allocator.allocate(allocator.n_pages)
        shuffled = list(pages)
        random.Random(0).shuffle(shuffled)
        allocator.free(shuffled)
        yield from _rows(allocator, n, page_size, repeat)


def _rows(allocator: PageAllocator, n: int, page_size: int, repeat: int) -> Iterator[Row]:
    taken: list[array[int]] = []

    def all_free() -> None:
        for pages in taken:
            allocator.free(pages)
        taken.clear()

    def all_taken() -> None:
        all_free()
        taken.extend([allocator.allocate(n) for _ in range(N_CALLS)])

    for name, call, setup in (
        ("allocate", lambda: taken.append(allocator.allocate(n)), all_free),
        ("free", lambda: allocator.free(taken.pop()), all_taken),
    ):
        wall, cpu = measure(call, repeat=repeat, number=N_CALLS, setup=setup)
        yield Row(
            table="page allocator",
            name=f"{name} {N_TOKENS} tokens, page size {page_size}",
            unit="us",
            samples=[s * 1e6 for s in wall],
            cpu_samples=[s * 1e6 for s in cpu],
            target="≤ 2 us" if page_size == 64 else None,
        )
