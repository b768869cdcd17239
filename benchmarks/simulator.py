"""The fleet simulator: how long it takes, also beside the tree alone.

``python -m tools.simulator_check`` compares its results with a real server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.eviction_traces import EXCERPT, Cache, Trace
from benchmarks.eviction_traces import read_trace as read_blocks
from benchmarks.harness import Row
from hicache_core.bench.lengths import Lengths, Sharing, blocks_for
from hicache_core.bench.traces import TraceRequest, read_trace
from hicache_core.fleet.setting import Setting
from hicache_core.fleet.simulation import Load, simulate

TARGET = "≤ 30 s for 10,000 requests"


def generated(n_requests: int) -> list[TraceRequest]:
    """Requests with prompts of 100 to 8,000 tokens, half of which continue another one."""
    lengths = [Lengths(n / 5, 100 + n * 7919 % 7900, 1 + n * 31 % 500) for n in range(n_requests)]
    made = blocks_for(lengths, Sharing())
    return [
        TraceRequest(one.at_s, one.n_input, one.n_output, blocks, 16)
        for one, blocks in zip(lengths, made, strict=True)
    ]


SETTINGS = {
    "device 40 GB": Setting(),
    "device 40 GB, host 200 GB": Setting(host_gb=200),
    "4 servers, storage 2 TB": Setting(servers=4, host_gb=100, storage_gb=2000),
}


def rows(quick: bool) -> Iterator[Row]:
    """Seconds for a trace, and milliseconds for a request beside the bare tree."""
    n = 1000 if quick else 10_000
    requests = generated(n)
    n_tokens = sum(one.input_length for one in requests)
    table = f"simulator: {n:,} generated requests, {n_tokens:,} tokens of prompts"
    for name, setting in SETTINGS.items():
        wall, cpu = _timed(partial(simulate, setting, requests))
        yield Row(table, name, "s", [wall], [cpu], target=TARGET)
    yield from _beside_the_tree()


def _beside_the_tree() -> Iterator[Row]:
    """The excerpt, through the tree alone and through the simulator, with pages of its blocks."""
    table = "simulator: the excerpt of Mooncake, a device of 25 %"
    trace, requests = read_blocks(EXCERPT), read_trace(EXCERPT)
    n_pages = trace.capacity(25)
    wall, cpu = _timed(partial(_through_tree, trace, n_pages))
    tree = "eviction_traces.py: the tree alone"
    yield Row(table, tree, "s", [wall], [cpu])
    setting = Setting(
        device_gb=(n_pages + 0.5) * 512 * 1000 / 1e9, page_size=512, token_nbytes=1000
    )
    for name, load in (("one request at a time", Load(max_parallel=1)), ("as it arrives", Load())):
        wall, cpu = _timed(partial(simulate, setting, requests, load))
        yield Row(table, f"simulator, {name}", "s", [wall], [cpu], baseline=tree)


def _through_tree(trace: Trace, n_pages: int) -> None:
    cache = Cache("lru", n_pages)
    for prompt in trace.prompts:
        cache.serve(prompt)


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - cpu
