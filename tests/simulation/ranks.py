"""Ranks in lockstep: each step runs on every rank, and meets the others in the collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from hicache_core.ranks.base import RankGroup
from tests.simulation.clock import InvariantBroken, VirtualClock

T = TypeVar("T")

MAX_COLLECTIVES = 1000
"""More collectives than any moment needs: beyond it, somebody polls in a circle without waiting."""


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
        if self.window is not None and len(values) != self.window:
            raise InvariantBroken(
                f"fixed shape: rank {self.rank} has {len(values)} values, not {self.window}"
            )
        deposited = self._lockstep.meet(self.rank, list(values))
        if len(deposited) == 1:
            return deposited[0]
        if len({len(values) for values in deposited}) != 1:
            raise InvariantBroken(f"fixed shape: the ranks have {deposited}")
        return [min(values) for values in zip(*deposited, strict=True)]

    def gather(self, text: str) -> list[str]:
        # docstring inherited
        return self._lockstep.meet(self.rank, text)


class Lockstep:
    """Runs one step on all ranks, as greenlets that stop where they enter a collective.

    A rank that enters one collective more or fewer than another, or with another number of values,
    would hang in production; here it is found at once.
    """

    def __init__(self, world_size: int, clock: VirtualClock, draw: Random) -> None:
        self._clock = clock
        self._draw = draw
        self._world_size = world_size
        self._deposited: dict[int, Any] = {}
        self._moment = 0.0
        self._n_collectives = 0  # at this moment

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
            deposited, self._deposited = self._deposited, {}
            if results:
                raise InvariantBroken(
                    f"no hang: ranks {sorted(deposited)} entered a collective that ranks "
                    f"{sorted(results)} did not"
                )
            self._draw.shuffle(order)
            for rank in order:
                tasks[rank].switch([deposited[rank] for rank in range(self._world_size)])
        return [results[rank] for rank in range(self._world_size)]

    def meet(self, rank: int, deposit: T) -> list[T]:
        """Leaves what a rank brings; what all ranks brought, by rank."""
        if self._moment != self._clock.now:
            self._moment, self._n_collectives = self._clock.now, 0
        self._n_collectives += 1
        if self._n_collectives > MAX_COLLECTIVES:
            raise InvariantBroken(f"no spinning: {MAX_COLLECTIVES} collectives, and no time passed")
        if self._world_size == 1:
            return [deposit]
        self._deposited[rank] = deposit
        hub = getcurrent().parent
        assert hub is not None
        all_deposits: list[T] = hub.switch()
        return all_deposits
