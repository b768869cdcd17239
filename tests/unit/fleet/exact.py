"""An exact LRU of pages, and settings whose sizes are pages; knows nothing of trees and tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path

from hicache_core.bench.lengths import BLOCK_TOKENS, Lengths, Sharing, blocks_for
from hicache_core.bench.traces import TraceRequest
from hicache_core.fleet.prompts import Prompts
from hicache_core.fleet.setting import Setting, StorageProfile

EXCERPT = Path(__file__).parents[3] / "benchmarks/traces/mooncake_1000.jsonl"
PAGE = 64
TOKEN_NBYTES = 1000


def gb(pages: int) -> float:
    """Room for so many pages, and a half so that rounding takes none away."""
    return (pages + 0.5) * PAGE * TOKEN_NBYTES / 1e9 if pages else 0.0


def setting(
    device: int, host: int = 0, store: int = 0, *, servers: int = 1, **values: object
) -> Setting:
    """A fleet with tiers of so many pages."""
    values.setdefault("storage", StorageProfile(1e-4, 1e-4))
    return Setting(
        servers=servers,
        device_gb=gb(device),
        host_gb=gb(host),
        storage_gb=gb(store),
        page_size=PAGE,
        token_nbytes=TOKEN_NBYTES,
        **values,  # type: ignore[arg-type]
    )


def generated(n: int, *, seed: int = 1, continues: float = 0.7) -> list[TraceRequest]:
    """A trace of ``n`` requests, ten a second, with lengths that are no whole pages."""
    lengths = [Lengths(i / 10, 100 + i * 7919 % 1900, 1 + i * 31 % 90) for i in range(n)]
    sharing = Sharing(continues=continues, system_prompts=4, system_tokens=320, seed=seed)
    made = blocks_for(lengths, sharing)
    return [
        TraceRequest(one.at_s, one.n_input, one.n_output, blocks, BLOCK_TOKENS)
        for one, blocks in zip(lengths, made, strict=True)
    ]


class ExactLRU:
    """Pages by their whole prefix; of pages used at the same time the deepest leaves first."""

    def __init__(self, capacity: int, *, keeps_tails: bool) -> None:
        """An empty cache.

        Args:
            capacity: pages.
            keeps_tails: whether the page that a request has begun and not filled needs room.
        """
        self._capacity = capacity
        self._keeps_tails = keeps_tails
        self._names: dict[tuple[int, bytes], int] = {}
        self._used: dict[int, tuple[int, int]] = {}  # page -> when, minus its depth
        self._order: list[tuple[int, int, int]] = []
        self._now = 0

    def serve(self, prompt: bytes, answer: bytes) -> int:
        """Tokens of the prompt that were there."""
        self._now += 1
        tokens = prompt + answer
        pages = list(self._pages(tokens))
        n_usable = (len(prompt) // 4 - 1) // PAGE
        hits = pages[: next((n for n, p in enumerate(pages) if p not in self._used), len(pages))]
        hits = hits[:n_usable]
        n_needed = len(pages) + (self._keeps_tails and len(tokens) // 4 % PAGE > 0) - len(hits)
        self._make_room(n_needed, set(hits))
        for depth, page in enumerate(pages):
            self._used[page] = (self._now, -depth)
            heappush(self._order, (self._now, -depth, page))
        return len(hits) * PAGE

    def _pages(self, tokens: bytes) -> Iterator[int]:
        name = -1
        for start in range(0, len(tokens) // (4 * PAGE) * 4 * PAGE, 4 * PAGE):
            key = (name, tokens[start : start + 4 * PAGE])
            name = self._names.setdefault(key, len(self._names))
            yield name

    def _make_room(self, n: int, locked: set[int]) -> None:
        kept = []
        while self._capacity - len(self._used) < n:
            used, depth, page = heappop(self._order)
            if self._used.get(page) != (used, depth):
                continue  # used again since
            if page in locked:
                kept.append((used, depth, page))
            else:
                del self._used[page]
        for one in kept:
            heappush(self._order, one)


def exact_hits(requests: Sequence[TraceRequest], capacity: int, *, keeps_tails: bool) -> list[int]:
    """Tokens that each request finds in an exact LRU, one after the other.

    Args:
        requests: the trace.
        capacity: pages.
        keeps_tails: as of ``ExactLRU``.
    """
    prompts, cache = Prompts(requests), ExactLRU(capacity, keeps_tails=keeps_tails)
    return [
        cache.serve(prompts.prompt(n), prompts.answer(n, max(1, one.output_length) - 1))
        for n, one in enumerate(requests)
    ]
