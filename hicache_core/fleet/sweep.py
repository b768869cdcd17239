"""A sweep: every combination of the listed values, each simulated on a core of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from typing import Any

from hicache_core.bench.traces import TraceRequest
from hicache_core.fleet.result import Result
from hicache_core.fleet.setting import Setting
from hicache_core.fleet.simulation import Load, simulate

Job = tuple[Setting, int]
"""A setting, and the index of a trace."""

_shared: list[Any] = []


def combinations(base: Setting, lists: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """A setting for each combination; the last list changes fastest.

    Args:
        base: has all other values.
        lists: by name of a field of ``Setting``, its values.

    Raises:
        ConfigError: a combination cannot be.
    """
    return [
        replace(base, **dict(zip(lists, values, strict=True)))
        for values in product(*lists.values())
    ]


def run_all(
    settings: Sequence[Setting],
    traces: Sequence[Sequence[TraceRequest]],
    load: Load,
    n_processes: int,
) -> Iterator[Result]:
    """Simulates every setting with every trace; the results come in that order, trace by trace.

    Args:
        settings: the fleets.
        traces: what each of them serves.
        load: how a trace arrives.
        n_processes: how many simulations run at once.
    """
    jobs = [(setting, n) for n in range(len(traces)) for setting in settings]
    n_processes = min(n_processes, len(jobs))
    if n_processes <= 1:
        for setting, n in jobs:
            yield simulate(setting, traces[n], load)
        return
    pool = ProcessPoolExecutor(n_processes, get_context("spawn"), _begin, (traces, load))
    with pool:
        yield from pool.map(_one, jobs)


def _begin(traces: Sequence[Sequence[TraceRequest]], load: Load) -> None:
    _shared[:] = [traces, load]


def _one(job: Job) -> Result:
    traces, load = _shared
    setting, n = job
    return simulate(setting, traces[n], load)
