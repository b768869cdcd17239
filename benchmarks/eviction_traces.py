"""Eviction policies on traces: hit rates of caches that hold a part of what is asked for.

    python -m benchmarks.eviction_traces [--quick] [--trace FILE ...]

A trace is a JSONL file in Mooncake's format, of which ``hash_ids`` are read. One real excerpt lies
in ``traces/``; HICACHE_TRACES (paths, separated as in PATH) adds whole ones. The generated
workloads are called so.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path

import click

from benchmarks.harness import Row
from hicache_core.kv.keys import pack_tokens
from hicache_core.radix import POLICY_NAMES, RadixTree, eviction_policy

EXCERPT = Path(__file__).parent / "traces" / "mooncake_1000.jsonl"
PERCENTS = (1, 5, 10, 25)
# Under `priority` without priorities everything is as under `lru`.
POLICIES = tuple(name for name in POLICY_NAMES if name != "priority")
BOUND = "no eviction"


@dataclass(frozen=True)
class Trace:
    """Prompts in the order of their arrival.

    Attributes:
        name: names the source, or says that it is generated.
        prompts: block ids; a block is a page, and one token in the tree.
    """

    name: str
    prompts: list[list[int]]

    @cached_property
    def n_distinct(self) -> int:
        """Different blocks of all prompts."""
        return len({block for prompt in self.prompts for block in prompt})

    def capacity(self, percent: int) -> int:
        """Pages of a cache that holds so much of the different blocks."""
        return max(1, self.n_distinct * percent // 100)


def read_trace(path: Path) -> Trace:
    """A trace in Mooncake's format, also packed by gzip."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return Trace(path.name, [json.loads(line)["hash_ids"] for line in lines if line.strip()])


def chats(n_requests: int) -> Trace:
    """Generated: conversations over three system prompts; each turn goes on with odds of 7 in 10.

    Between two turns come 400 other requests in the mean, by an exponential distribution.
    """
    rng = random.Random(11)
    fresh = iter(range(1, 1 << 31))
    systems = [[next(fresh) for _ in range(n)] for n in (4, 12, 24)]
    waiting: list[tuple[float, list[int]]] = []
    prompts = []
    for now in range(n_requests):
        is_due = bool(waiting) and waiting[0][0] <= now
        talk = heappop(waiting)[1] if is_due else rng.choice(systems)
        talk = talk + [next(fresh) for _ in range(rng.randrange(2, 12))]
        prompts.append(talk)
        if rng.random() < 0.7:
            heappush(waiting, (now + rng.expovariate(1 / 400), talk))
    return Trace("generated: chats", prompts)


def documents(n_requests: int) -> Trace:
    """Generated: questions on documents, a few of them popular, and as many that come once."""
    rng = random.Random(12)
    fresh = iter(range(1, 1 << 31))
    system = [next(fresh) for _ in range(6)]
    known = [[next(fresh) for _ in range(rng.randrange(8, 40))] for _ in range(n_requests // 10)]
    weights = [1 / (rank + 1) ** 0.8 for rank in range(len(known))]
    prompts = []
    for _ in range(n_requests):
        if rng.random() < 0.5:
            document = rng.choices(known, weights)[0]
        else:
            document = [next(fresh) for _ in range(rng.randrange(8, 40))]
        prompts.append([*system, *document, next(fresh)])
    return Trace("generated: documents", prompts)


class Cache:
    """A device of so many pages, served as an engine does it: match, make room, insert."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.tree = RadixTree(1, eviction_policy(policy), eviction_policy(policy))
        self.capacity = capacity
        self.free = array("i", range(capacity))

    def serve(self, prompt: list[int]) -> int:
        """Pages of the prompt that were there; of one longer than the cache the front is kept."""
        tokens = pack_tokens(prompt[: self.capacity])
        match = self.tree.match(tokens)
        n_hits = len(match.device_pages)
        n_new = min(len(prompt), self.capacity) - n_hits
        self.tree.lock(match.node)
        while len(self.free) < n_new:
            victim = self.tree.device_victim(n_new - len(self.free))
            assert victim is not None
            self.free.extend(self.tree.drop_device(victim).device_pages)
        start = len(self.free) - n_new
        self.tree.insert(tokens, match.device_pages + self.free[start:])
        del self.free[start:]
        self.tree.unlock(match.node)
        return n_hits


def hit_rate(trace: Trace, policy: str, capacity: int) -> float:
    """Pages served from the cache, in percent of all pages asked for.

    Args:
        trace: the prompts.
        policy: name of the eviction policy.
        capacity: pages that the cache holds.
    """
    cache = Cache(policy, capacity)
    n_hits = sum(cache.serve(prompt) for prompt in trace.prompts)
    return 100 * n_hits / sum(map(len, trace.prompts))


def traces(quick: bool, paths: Iterable[Path] = ()) -> Iterator[Trace]:
    """The excerpt, those of HICACHE_TRACES and ``paths``, and the generated workloads."""
    yield read_trace(EXCERPT)
    named = os.environ.get("HICACHE_TRACES", "").split(os.pathsep)
    for path in [*map(Path, filter(None, named)), *paths]:
        yield read_trace(path)
    n_requests = 800 if quick else 3000
    yield chats(n_requests)
    yield documents(n_requests)


def rows(quick: bool) -> Iterator[Row]:
    """A table for each trace and size of the cache."""
    for trace in traces(quick):
        bound = hit_rate(trace, "lru", trace.n_distinct)
        size = f"{len(trace.prompts):,} requests, {trace.n_distinct:,} different pages"
        for percent in PERCENTS:
            table = f"eviction: {trace.name}, a cache of {percent} %"
            yield Row(table, BOUND, "%", [bound], note=size)
            for policy in POLICIES:
                rate = hit_rate(trace, policy, trace.capacity(percent))
                yield Row(table, policy, "%", [rate], baseline="lru")


def matrix(trace: Trace) -> str:
    """All rates of a trace as Markdown: a line for each policy, a column for each size."""
    lines = [
        f"**{trace.name}**: {len(trace.prompts):,} requests, {trace.n_distinct:,} different pages; "
        f"without eviction {hit_rate(trace, 'lru', trace.n_distinct):.1f} %.",
        "",
        "| policy | " + " | ".join(f"{percent} %" for percent in PERCENTS) + " |",
        "|---|" + "---|" * len(PERCENTS),
    ]
    for policy in POLICIES:
        rates = [hit_rate(trace, policy, trace.capacity(percent)) for percent in PERCENTS]
        lines.append(f"| `{policy}` | " + " | ".join(f"{rate:.1f}" for rate in rates) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="Smaller generated workloads.")
@click.option("--trace", "paths", multiple=True, type=click.Path(exists=True, path_type=Path))
def main(quick: bool, paths: tuple[Path, ...]) -> None:
    """Prints hit rates in percent of the pages asked for, as Markdown."""
    for trace in traces(quick, paths):
        click.echo(matrix(trace) + "\n")


if __name__ == "__main__":
    main()
