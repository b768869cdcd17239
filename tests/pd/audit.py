"""audited: a scheduler after each of whose steps every device page and unit has one owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from hicache_core.controller.controller import Controller
from hicache_core.engine.page_table import PageTable
from hicache_core.engine.scheduler import MakeScheduler, Scheduler
from hicache_core.engine.units import SequenceUnits
from hicache_core.radix.results import LACKING


def audited(make_scheduler: MakeScheduler) -> MakeScheduler:
    """Makes the same schedulers; one that leaks ends its engine with an error."""

    def make(cache: Controller, *args: Any, **kwargs: Any) -> Scheduler:
        scheduler = make_scheduler(cache, *args, **kwargs)
        step = scheduler.step

        def checked() -> bool:
            result = step()
            check(cache, scheduler._tables())
            return result

        scheduler.step = checked  # type: ignore[method-assign]
        return scheduler

    return make


def check(cache: Controller, tables: Iterable[PageTable]) -> None:
    """What is neither free nor the tree's belongs to exactly one of ``tables``."""
    cache.check_integrity()
    if not cache.loads_settled:
        return  # what is loaded belongs to nobody that one could ask, so far
    parts, tables = cache.parts, list(tables)
    owners = Counter(page for table in tables for page in table._mine)
    assert set(owners.values()) <= {1}
    n_taken = parts.device.n_pages - parts.device.allocator.n_free
    assert len(owners) == n_taken - parts.tree.n_device_pages
    for at, group in enumerate(parts.groups):
        owners = Counter(unit for table in tables for unit in own_units(table.units, at))
        assert set(owners.values()) <= {1}
        device = group.held.device
        n_taken = device.n_units - device.n_free - device.n_let_go
        assert len(owners) == n_taken - group.held.n_device_units, group.held.group.name


def own_units(units: SequenceUnits, group: int) -> list[int]:
    """The units of a sequence that it must give back itself."""
    own = list(units._spares[group])
    for window in units._windows:
        if window.group == group:
            own += window._mine
    for state in units._states:
        if state.group == group:
            own += [*state._snapshots.values()]
            own += [state.working] if state.working != LACKING else []
    return own
