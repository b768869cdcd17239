"""One soak: an engine under way while the stores fail, come and go."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hicache_core.controller.attachment import Attaching
from tests.servers.valkey import Valkey, running
from tests.soak.engine import PREFETCH_S, Engine, open_world
from tests.soak.samples import Growth, Sample, growth
from tests.soak.weather import SKY, Seasons

FILE_NBYTES, SERVER_NBYTES = 2_000_000, 20_000_000
CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a soak is.

    Attributes:
        seconds: how long requests run.
        seed: of requests, weather and swaps; threads and the system's timing are not in it.
        spell_s: how long one weather lasts on average; a backend stays about twice as long.
        sample_s: time between two looks at the process.
        margin_s: what a request may take beyond its wait for storage.
    """

    seconds: float
    seed: int = 1
    spell_s: float = 1.0
    sample_s: float = 1.0
    margin_s: float = 1.0


@dataclass(slots=True)
class Report:
    """What came of it.

    Attributes:
        plan: what was asked.
        events: what happened to the storage tier, and how often.
        faults: how often each fault struck.
        server: what was done to the server, and how often.
        pages: pages that requests found, by tier, and those that were computed.
        latencies_s: how long each request took.
        waits_s: what each request waited for storage.
        closes_s: how long each ``close`` took.
        growth: of memory, threads and descriptors.
        problems: what makes it a failure, a line each.
    """

    plan: Plan
    events: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    server: dict[str, int] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    closes_s: list[float] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Soak:
    """The engine, and what is done to its storage tier between two requests."""

    def __init__(self, plan: Plan, directory: Path, server: Valkey) -> None:
        self._plan = plan
        self._rng = random.Random(f"soak {plan.seed}")
        file = _dynamic("StormyFile", path=str(directory / "store"), max_nbytes=FILE_NBYTES)
        server_config = {"url": server.url, "socket_timeout_s": 0.3, "connect_timeout_s": 0.3}
        redis = _dynamic("StormyRedis", **server_config)
        links = [
            {"name": name, "backend": "dynamic", "config": config}
            for name, config in (("redis", redis), ("file", file))
        ]
        self._stores: dict[str, tuple[str, Mapping[str, Any]]] = {
            "file": ("dynamic", file),
            "redis": ("dynamic", redis),
            "chain": ("chain", {"links": links, "write": "behind"}),
        }
        self._turns = itertools.cycle(["redis", "chain", "file"])
        self._asked = ""
        self._attaching: Attaching | None = None
        self._events: Counter[str] = Counter()
        self._next_change = 0.0
        self.report = Report(plan)
        self.engine = Engine(open_world(self._stores["file"][1]), plan.seed)

    def run(self) -> None:
        """Requests, changes and looks until the time is over."""
        samples: list[Sample] = []
        start = time.monotonic()
        while (now := time.monotonic() - start) < self._plan.seconds:
            if now >= len(samples) * self._plan.sample_s:
                samples.append(Sample.now(now))
            if now >= self._next_change:
                self._next_change = now + self._plan.spell_s * self._rng.uniform(1.0, 3.0)
                self._change()
            if self._attaching is not None and self._attaching.done:
                what = "attach failed" if self._attaching.error else "attached"
                self._events[f"{what}: {self._asked}"] += 1
                self._attaching = None
            self.engine.step()
        self.report.growth, self.report.events = growth(samples), dict(self._events)

    def close(self) -> None:
        """Closes the cache in bounded time."""
        self.engine.release()
        began = time.monotonic()
        self.engine.world.cache.close(CLOSE_S)
        self.report.closes_s.append(time.monotonic() - began)

    def _change(self) -> None:
        draw, cache = self._rng.random(), self.engine.world.cache
        if self._attaching is not None:
            self._events["attach pending"] += 1
        elif draw < 0.6:
            self._asked = next(self._turns)
            self._attaching = cache.attach_storage(*self._stores[self._asked])
        elif draw < 0.8:
            cache.detach_storage()
            self._events["detached"] += 1
        else:
            self.close()
            self.engine.world = open_world(self._stores["file"][1])
            self._events["restarted"] += 1


def run(plan: Plan, directory: Path) -> Report:
    """Carries out ``plan`` with its files in ``directory``.

    Raises:
        AssertionError: wrong bytes were served, or an invariant does not hold.
    """
    options = ("--maxmemory", str(SERVER_NBYTES), "--maxmemory-policy", "allkeys-lru")
    with running(*options) as server:
        soak = _Soak(plan, directory, server)
        seasons = Seasons(server, plan.seed, plan.spell_s)
        seasons.start()
        try:
            soak.run()
        finally:
            seasons.stop()
            soak.close()
    report = soak.report
    report.faults, report.server = SKY.struck(), dict(seasons.server_events)
    report.pages = dict(soak.engine.pages)
    report.latencies_s = list(soak.engine.latencies_s)
    report.waits_s = list(soak.engine.waits_s)
    report.problems = list(_problems(report))
    return report


def _dynamic(class_name: str, **settings: Any) -> Mapping[str, Any]:
    """Settings of a ``dynamic`` backend of ``weather``."""
    chosen = {"backend_name": class_name.lower(), "module_path": "tests.soak.weather"}
    return chosen | {"class_name": class_name} | settings


def _problems(report: Report) -> list[str]:
    found = []
    bound_s = PREFETCH_S + report.plan.margin_s
    if (slowest := max(report.latencies_s)) > bound_s:
        n_slow = sum(latency > bound_s for latency in report.latencies_s)
        waited_s = report.waits_s[report.latencies_s.index(slowest)]
        found.append(
            f"{n_slow} requests took longer than {bound_s} s, up to {slowest:.2f} s, of which that "
            f"one waited {waited_s:.2f} s for storage"
        )
    # It drains for so long, then gives the worker of each backend its time, and the same to close.
    bound_s = CLOSE_S + 2 * (2 * CLOSE_S + 1.0) + report.plan.margin_s
    if (slowest := max(report.closes_s)) > bound_s:
        found.append(f"a close took {slowest:.2f} s, more than {bound_s} s")
    for figure in report.growth:
        if figure.grows:
            found.append(
                f"{figure.name} grew from {figure.early:,.0f} to {figure.late:,.0f}, by more than "
                f"{figure.noise:,.0f}"
            )
    if not report.pages.get("storage"):
        found.append("storage never delivered a page: this was no test")
    return found
