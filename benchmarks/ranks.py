"""What one agreement between ranks costs: the collective of every ``poll()``."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.harness import Row
from hicache_core.ranks.base import SingleRank
from hicache_core.ranks.gloo import TorchRankGroup

WINDOW = 256
TABLE = "Ranks, one agreement of {n} processes on one machine"


def rows(quick: bool) -> Iterator[Row]:
    """Median and spread over batches of agreements, as rank 0 sees them."""
    n_batches, n_calls = (5, 40) if quick else (15, 200)
    windows = [WINDOW] if quick else [WINDOW // 4, WINDOW, WINDOW * 4]
    single = SingleRank()
    for n_ranks in (2, 4):
        table = TABLE.format(n=n_ranks)
        values = [0] * WINDOW
        start = time.perf_counter()
        for _ in range(1000):
            single.agree_min(values)
        alone = (time.perf_counter() - start) / 1000
        yield Row(table, "alone, 256 values", "us", [alone * 1e6])
        for window in windows:
            wall, cpu = _agreements(n_ranks, window, n_batches, n_calls)
            name = f"{n_ranks} ranks, gloo on the loopback, {window} values"
            yield Row(table, name, "us", wall, cpu, note="by CPU time: rank 0, all its threads")


def _agreements(
    n_ranks: int, window: int, n_batches: int, n_calls: int
) -> tuple[list[float], list[float]]:
    """Microseconds of one agreement, a sample for each batch: by wall clock and by CPU time."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        store = f"file://{Path(directory) / 'meeting'}"
        ours, theirs = context.Pipe()
        arguments = (n_ranks, store, window, n_batches, n_calls)
        processes = [
            context.Process(target=_rank, args=(rank, *arguments, theirs if rank == 0 else None))
            for rank in range(n_ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        result: tuple[list[float], list[float]] = ours.recv()
        for process in processes:
            process.join()
    return result


def _rank(
    rank: int,
    n_ranks: int,
    store: str,
    window: int,
    n_batches: int,
    n_calls: int,
    pipe: Connection | None,
) -> None:
    torch.set_num_threads(1)
    wall, cpu = [], []
    with TorchRankGroup.create(rank, n_ranks, store, window=window) as group:
        values = [rank] * window
        for _ in range(n_batches):
            calls = []
            cpu_start = time.process_time()
            for _ in range(n_calls):
                start = time.perf_counter()
                group.agree_min(values)
                calls.append(time.perf_counter() - start)
            wall.append(statistics.median(calls) * 1e6)
            cpu.append((time.process_time() - cpu_start) / n_calls * 1e6)
        group.gather("done")
    if pipe is not None:
        pipe.send((wall, cpu))
