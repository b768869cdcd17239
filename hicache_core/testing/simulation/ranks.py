"""Ranks in lockstep: each step runs on every rank, and meets the others in the collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from greenlet import getcurrent, greenlet

from hicache_core.ranks import RankGroup
from hicache_core.testing.simulation.clock import InvariantBroken

T = TypeVar("T")

MAX_COLLECTIVES = 100_000
"""More collectives than any schedule needs: beyond it, somebody polls in a circle."""


class SimRankGroup(RankGroup):
    """One rank's door to the others."""

    def __init__(self, lockstep: Lockstep, rank: int, world_size: int, window: int | None) -> None:
        """A rank of ``lockstep``."""
        self.rank = rank
        self.world_size = world_size
        self.window = window
        self._lockstep = lockstep

    def agree_min(self, values: Sequence[int]) -> list[int]:
        # docstring inherited
        return self._lockstep.meet(self, values)


class Lockstep:
    """Runs one step on all ranks, as greenlets that stop where they enter a collective.

    A rank that enters one collective more or fewer than another, or with another number of values,
    would hang in production; here it is found at once.
    """

    def __init__(self, world_size: int, draw: Random) -> None:
        self._draw = draw
        self._world_size = world_size
        self._deposited: dict[int, list[int]] = {}
        self._n_collectives = 0

    def run(self, step: Callable[[int], T]) -> list[T]:
        """The results of ``step(rank)``, by rank.

        Raises:
            InvariantBroken: the ranks did not enter the same collectives.
        """
        if self._world_size == 1:
            return [step(0)]
        results: dict[int, T] = {}

        def run_rank(rank: int) -> None:
            results[rank] = step(rank)

        tasks = [greenlet(run_rank) for _ in range(self._world_size)]
        order = list(range(self._world_size))
        self._draw.shuffle(order)
        for rank in order:
            tasks[rank].switch(rank)
        while self._deposited:
            agreed = self._agree(results)
            self._draw.shuffle(order)
            for rank in order:
                tasks[rank].switch(agreed)
        return [results[rank] for rank in range(self._world_size)]

    def meet(self, group: SimRankGroup, values: Sequence[int]) -> list[int]:
        """Leaves a rank's values and returns the minima of all ranks."""
        self._n_collectives += 1
        if self._n_collectives > MAX_COLLECTIVES:
            raise InvariantBroken(f"progress: {MAX_COLLECTIVES} collectives, and it goes on")
        if group.window is not None and len(values) != group.window:
            raise InvariantBroken(
                f"fixed shape: rank {group.rank} has {len(values)} values, not {group.window}"
            )
        if self._world_size == 1:
            return list(values)
        self._deposited[group.rank] = list(values)
        hub = getcurrent().parent
        assert hub is not None
        agreed: list[int] = hub.switch()
        return agreed

    def _agree(self, finished: dict[int, T]) -> list[int]:
        deposited, self._deposited = self._deposited, {}
        if finished:
            raise InvariantBroken(
                f"no hang: ranks {sorted(deposited)} entered a collective that ranks "
                f"{sorted(finished)} did not"
            )
        if len({len(values) for values in deposited.values()}) != 1:
            raise InvariantBroken(f"fixed shape: the ranks have {deposited}")
        return [min(values) for values in zip(*deposited.values(), strict=True)]
