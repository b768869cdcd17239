"""Many schedules, on all cores, until one fails."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tests.simulation.schedule import N_STEPS, run_schedule
from tests.simulation.trace import ScheduleFailed

CHUNK = 50
"""Schedules that a process takes at a time."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some schedules for one process: the seeds from ``first`` on."""

    first: int
    n_schedules: int
    ranks: int | None
    groups: bool | None
    n_steps: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of many schedules.

    Attributes:
        n_schedules: how many ended.
        tally: how often what happened in them; ``steps``, each followed by all checks, above all.
        elapsed_s: real seconds.
        failure: the failure with the lowest seed among those seen; None if all went well.
    """

    n_schedules: int
    tally: Counter[str]
    elapsed_s: float
    failure: ScheduleFailed | None

    def __str__(self) -> str:
        verdict = "all invariants held" if self.failure is None else "an invariant does not hold"
        return (
            f"{self.n_schedules} schedules, {self.tally['steps']} steps in {self.elapsed_s:.1f} s: "
            f"{verdict}"
        )


def run_many(
    n_schedules: int,
    seed: int,
    *,
    ranks: int | None = None,
    groups: bool | None = None,
    n_steps: int = N_STEPS,
    n_jobs: int | None = None,
    progress: Callable[[int], None] = lambda _n: None,
) -> Outcome:
    """Runs the schedules of ``seed``, ``seed + 1``, … until all are done or one fails.

    Args:
        n_schedules: how many.
        seed: of the first.
        ranks: as in ``run_schedule``.
        groups: as in ``run_schedule``.
        n_steps: as in ``run_schedule``.
        n_jobs: processes; one for each core if None. With 1, nothing is started.
        progress: called with the number of schedules done, now and then.
    """
    start = time.monotonic()
    chunks = [
        Chunk(first, min(CHUNK, seed + n_schedules - first), ranks, groups, n_steps)
        for first in range(seed, seed + n_schedules, CHUNK)
    ]
    n_done = 0
    tally: Counter[str] = Counter()
    failure = None
    for n_ended, more, failed in _results(chunks, n_jobs or multiprocessing.cpu_count()):
        n_done += n_ended
        tally += more
        progress(n_done)
        if failed is not None:
            failure = failed
            break
    return Outcome(n_done, tally, time.monotonic() - start, failure)


Result = tuple[int, Counter[str], ScheduleFailed | None]
"""Schedules that ended well, what happened in them, and the failure that stopped them."""


def _results(chunks: list[Chunk], n_jobs: int) -> Iterator[Result]:
    if n_jobs == 1:
        yield from map(_run_chunk, chunks)
        return
    # Spawned, since torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_jobs, _start_process) as pool:
        yield from pool.imap(_run_chunk, chunks)


def _start_process() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # the backend fails on purpose, all the time
    gc.freeze()  # what was imported stays: to look through it for garbage takes half of the time


def _run_chunk(chunk: Chunk) -> Result:
    tally: Counter[str] = Counter()
    for n, seed in enumerate(range(chunk.first, chunk.first + chunk.n_schedules)):
        try:
            tally += run_schedule(
                seed, ranks=chunk.ranks, groups=chunk.groups, n_steps=chunk.n_steps
            )
        except ScheduleFailed as failure:
            return n, tally, failure
    return chunk.n_schedules, tally, None
