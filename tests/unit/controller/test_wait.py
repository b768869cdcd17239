"""A wait always waits, and not for long where other ranks keep this one waiting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hicache_core.controller.controller import RETRY_S, Controller
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.parts import Parts
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.copies.base import Ticket
from hicache_core.ranks.base import SingleRank


class Waits(Ticket):
    """A copy that never ends, and notes how long it was waited for."""

    error = None

    def __init__(self, waited_s: list[float]) -> None:
        self._waited_s = waited_s

    def done(self) -> bool:
        return False

    def wait(self, timeout_s: float | None = None) -> bool:
        assert timeout_s is not None
        self._waited_s.append(timeout_s)
        return False

    def wait_layer(self, layer: int) -> None:
        raise AssertionError(f"nobody reads layer {layer}")


class World:
    """A rank with a table of jobs, and no storage attached.

    Attributes:
        waited_s: how long each wait for a copy was.
        slept_s: how long each sleep was.
    """

    def __init__(self, *, storage: bool) -> None:
        self.jobs = JobTable(SingleRank())
        self.waited_s: list[float] = []
        self.slept_s: list[float] = []
        tier = StorageTier(self.jobs, cast(Any, None), cast(Any, None)) if storage else None
        slept = self.slept_s.append
        parts = SimpleNamespace(jobs=self.jobs, storage=tier, host=None, groups=(), sleep=slept)
        self.cache = Controller(cast(Parts, parts))


def test_with_nothing_to_wait_for_a_wait_sleeps() -> None:
    """Else an engine that waits between two polls, or a flush whose other ranks are not done, would
    enter one collective after the other."""
    for storage in (False, True):
        world = World(storage=storage)
        world.cache.wait(5.0)
        world.cache.wait(RETRY_S / 2)
        assert world.slept_s == [RETRY_S, RETRY_S / 2]


def test_a_copy_is_waited_for_as_long_as_asked() -> None:
    world = World(storage=True)
    world.jobs.add_copy(Waits(world.waited_s), 1, lambda _: None)
    world.cache.wait(5.0)
    assert (world.waited_s, world.slept_s) == ([5.0], [])


def test_a_rank_that_has_reported_looks_again_soon() -> None:
    """What it has to say may be settled as soon as the others are done; that is no news of ours."""
    world = World(storage=True)
    world.jobs.report(world.jobs.add(lambda _: None), 1)
    world.jobs.add_copy(Waits(world.waited_s), 1, lambda _: None)
    world.cache.wait(5.0)
    assert world.waited_s == [RETRY_S]
