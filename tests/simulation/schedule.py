"""One schedule: a life drawn from a seed, step by step, with every invariant after each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from random import Random
from typing import TypeVar

from hicache_core.controller.controller import Controller
from hicache_core.errors import HiCacheError
from hicache_core.kv.keys import pack_tokens
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext, Namespace
from tests.simulation import checks
from tests.simulation.assembly import STORES, Rank, World, open_rank
from tests.simulation.clock import InvariantBroken, VirtualClock
from tests.simulation.engine import Engine, Request, State
from tests.simulation.link import Weather, damaged
from tests.simulation.ranks import Lockstep, SimRankGroup
from tests.simulation.setup import NAMESPACES, Setup
from tests.simulation.trace import ScheduleFailed, Trace

T = TypeVar("T")

_numbers = count()  # a store is found by its name, so that no schedule may have that of another

N_STEPS = 28
"""Steps of a schedule, unless told otherwise."""

FAILURES = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    HiCacheError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a bug of the controller may raise."""

MAX_REQUESTS = 5
MAX_PAGES = 8


def run_schedule(
    seed: int,
    *,
    ranks: int | None = None,
    groups: bool | None = None,
    n_steps: int = N_STEPS,
    is_loud: bool = False,
) -> Counter[str]:
    """Runs the schedule of ``seed``; how often what happened in it, ``steps`` above all.

    Args:
        seed: the schedule is a function of this and of the next three.
        ranks: controllers in lockstep; the seed decides if None.
        groups: whether the model has groups of layers; the seed decides if None.
        n_steps: random steps before the end, which has some more.
        is_loud: print each step.

    Raises:
        ScheduleFailed: an invariant does not hold.
    """
    trace = Trace(is_loud)
    schedule = Schedule(seed, ranks, groups, trace)
    try:
        schedule.run(n_steps)
    except FAILURES as error:
        trace.add(schedule.world.clock.now, schedule.doing, f"{type(error).__name__}: {error}")
        raise ScheduleFailed(seed, f"{type(error).__name__}: {error}", trace.lines()) from error
    finally:
        schedule.abandon()
    schedule.tally["steps"] += len(trace.steps)
    return schedule.tally


class Schedule:
    """A life of one small world.

    Attributes:
        world: what outlives a process.
        doing: the step that is under way, or was the last.
        tally: how often what happened, on all ranks.
    """

    def __init__(self, seed: int, ranks: int | None, groups: bool | None, trace: Trace) -> None:
        """Draws the world; ``run`` lets it live."""
        self._draw = draw = Random(seed)
        self._trace = trace
        setup = Setup.drawn(draw, ranks, groups)
        self.doing = "start"
        self.tally: Counter[str] = Counter()
        self._is_touched = False  # since the last check
        self.world = World(
            setup,
            VirtualClock(),
            draw,
            weather=[Weather() for _ in range(setup.ranks)],
            share=f"simulation {next(_numbers)} ",
            skews=[draw.choice((0.0, 0.3, 1000.0)) for _ in range(setup.ranks)],
        )
        self._stores = [
            MemoryBackend(MemoryConfig(share=self.world.share + name), BackendContext("all"))
            for name in STORES
        ]
        for store in self._stores:
            store.open()  # keeps the objects between two lives of the cache
        self._lockstep = Lockstep(setup.ranks, self.world.clock, draw)
        self._ranks: list[Rank] = []
        self._n_requests = 0
        self._topics = [
            [draw.randrange(3) for _ in range(MAX_PAGES)] for _ in range(draw.randint(1, 3))
        ]
        self._steps: list[tuple[int, Callable[[], None]]] = [
            (120, self._advance),
            (50, self._arrive),
            (40, self._tick),
            (16, self._evict),
            (14, self._change_weather),
            (8, self._trouble_in_the_store),
            (4, self._restart),
            (6, self._abort),
            (6, self._flush),
            (5, self._attach),
            (2, self._detach),
            (2, self._reset),
        ]
        trace.add(0.0, f"start {asdict(setup)}", "")

    def run(self, n_steps: int) -> None:
        """Warms up, lives ``n_steps`` random steps, then comes to rest and ends."""
        self._open()
        self._warm_up()
        weights = [weight for weight, _ in self._steps]
        steps = [step for _, step in self._steps]
        for step in self._draw.choices(steps, weights, k=n_steps):
            step()
            if self._is_touched:  # else only the weather or a store is another
                self._check()
        self._come_to_rest()
        self._close()

    def abandon(self) -> None:
        """Ends whatever still runs."""
        for rank in self._ranks:
            rank.process.kill()
        for store in self._stores:
            store.close()

    # Lives.

    def _open(self) -> None:
        setup = self.world.setup
        groups = [
            SimRankGroup(self._lockstep, rank, setup.ranks, setup.window)
            for rank in range(setup.ranks)
        ]
        self._ranks = self._lockstep.run(lambda rank: open_rank(self.world, groups[rank]))

    def _restart(self) -> None:
        if self._draw.random() < 0.5:
            self.tally["crashes"] += 1
            self._do("crash", self._end)
        else:
            self._close()
        self._open()
        for topic in self._topics[:2]:  # what the store kept is asked for again
            name = self._arrive_with(
                topic[: self.world.setup.device_pages], NAMESPACES[0], prefetch=True
            )
            self._tick()
            self._start(name)

    def _close(self) -> None:
        timeout_s = self._draw.choice((0.0, 1.0, 30.0))
        start = self.world.clock.now
        self._do(f"close in {timeout_s} s", lambda rank: rank.engine.cache.close(timeout_s))
        took_s = self.world.clock.now - start
        if took_s > 60.0 * self.world.setup.ranks + 4 * timeout_s:
            raise InvariantBroken(f"close ends in time: it took {took_s} s of {timeout_s} s")
        for rank in self._ranks:
            self._end(rank)

    def _end(self, rank: Rank) -> None:
        """A process is gone; what it counted stays."""
        counters = rank.engine.cache.counters
        self.tally.update({name: getattr(counters, name) for name in counters.__slots__})
        for lost in rank.engine.cache.snapshot().evicted_pages:
            self.tally[f"pages_{lost.cause}_from_{lost.tier}"] += lost.n_pages
        for worker in rank.workers:
            self.tally.update({f"jobs_{state.value}": n for state, n in worker.told.items()})
            self.tally["jobs_hanging"] += rank.process.n_hanging
        rank.process.kill()

    def _come_to_rest(self) -> None:
        """Requests end, the weather is fair: then nothing may be locked, lost or under way."""
        for weather in self.world.weather:
            weather.delay_s, weather.error_rate = 0.01, 0.0
            weather.hang_rate, weather.damage_rate = 0.0, 0.0
        self._do("fair weather", lambda rank: rank.process.release())
        for request_id in list(self._engine.requests):
            self._abort_one(request_id)
        n_pages = self.world.setup.device_pages
        for _ in range(n_pages + 1):  # what is written back keeps what stands above it for a while
            if not self._agreed("flush at rest", lambda rank: rank.engine.cache.flush(10_000.0)):
                raise InvariantBroken("rest: flush does not return, though the store answers")
            for _ in range(4):
                self._tick(20.0)
            self._check()
            if not self._agreed("evict all", lambda rank: rank.engine.cache.evict(n_pages)):
                break
        self._do("check rest", self._check_rest)

    def _check_rest(self, rank: Rank) -> None:
        cache = rank.engine.cache
        parts = cache.parts
        if rank.engine.pool.allocator.n_free != self.world.setup.device_pages:
            raise InvariantBroken(
                f"rest: {rank.engine.pool.allocator.n_free} device pages are free of "
                f"{self.world.setup.device_pages}, though nobody uses any"
            )
        pages = parts.allocate_host(self.world.setup.host_pages)
        if len(pages) != self.world.setup.host_pages:
            raise InvariantBroken(f"rest: only {len(pages)} host pages can be had")
        assert parts.host is not None
        parts.host.allocator.free(pages)
        self._check_units_rest(rank)
        if rank.jobs.unsettled:
            raise InvariantBroken(f"settle once: jobs {rank.jobs.unsettled} never settled")

    def _check_units_rest(self, rank: Rank) -> None:
        """Every unit of both tiers can be had, and none is lent or only read."""
        paths = rank.engine.cache._group_paths
        for at, part in enumerate(rank.engine.cache.parts.groups):
            n_device, n_host = self.world.setup.device_units, self.world.setup.host_units
            rank.engine.cache.free_units(at, rank.engine.cache.allocate_units(at, n_device))
            units = paths.allocate_host(part, n_host)
            assert part.held.host is not None
            if len(units) != n_host:
                raise InvariantBroken(f"rest: only {len(units)} host units can be had of {n_host}")
            part.held.host.free(units)

    def _warm_up(self) -> None:
        """Fills the tiers with what is going to be asked for, and perhaps leaves it to storage."""
        for topic in self._topics:
            name = self._arrive_with(topic[: self.world.setup.device_pages], NAMESPACES[0])
            self._start(name)
            self._forward(name)
            self._finish(name)
            self._check()
        if self._draw.random() < 0.7:
            n_pages = self.world.setup.device_pages
            self._agreed("evict all", lambda rank: rank.engine.cache.evict(n_pages))
            self._agreed("flush", lambda rank: rank.engine.cache.flush(20.0))
            if self._draw.random() < 0.3:
                self._trouble_in_the_store()
            self._restart()

    # Steps.

    def _tick(self, seconds: float | None = None) -> None:
        if seconds is None:
            seconds = self._draw.choice((0.0, 0.001, 0.02, 0.1, 0.5, 3.0, 10.0))
        self.world.clock.advance(seconds)
        self._do("poll", lambda rank: rank.engine.cache.poll())

    def _arrive(self) -> None:
        if len(self._engine.requests) >= MAX_REQUESTS:
            return
        draw, setup = self._draw, self.world.setup
        most = min(MAX_PAGES, setup.device_pages)
        n_known = max(draw.randint(0, most), draw.randint(0, most))
        n_new = draw.choice((0, 0, 0, 1, 2)) if n_known + 2 <= setup.device_pages else 0
        pages = draw.choice(self._topics)[:n_known] + [draw.randrange(5) for _ in range(n_new)]
        namespace = draw.choice((*[NAMESPACES[0]] * 4, *NAMESPACES))
        self._arrive_with(pages, namespace, prefetch=draw.random() < 0.9)

    def _arrive_with(
        self, pages: list[int], namespace: Namespace, *, prefetch: bool = False
    ) -> str:
        """A request whose prompt has a page of one token for each of ``pages``; its name."""
        draw, page_size = self._draw, self.world.setup.page_size
        self._n_requests += 1
        name, priority = f"r{self._n_requests}", draw.randrange(3)
        n_tail = draw.choice((0, 1, 1, page_size - 1)) if prefetch else 0
        ids = [token for token in pages for _ in range(page_size)] + [9] * n_tail
        tokens = pack_tokens(ids)
        self._agreed(
            f"arrive {name} {pages} + {n_tail} {namespace.cache_salt or namespace.lora_id} "
            f"prefetch={prefetch}",
            lambda rank: rank.engine.arrive(
                Request(name, tokens, namespace, priority), prefetch=prefetch
            ),
        )
        return name

    def _advance(self) -> None:
        """Brings a request one stage further."""
        requests = list(self._engine.requests.values())
        if len(requests) < 2:
            self._arrive()
            return
        request = self._draw.choice(requests)
        name = request.request_id
        if request.state is State.WAITING:
            if self._draw.random() < 0.5:
                self._tick()
            if not self._start(name):
                self._tick()
        elif request.state is State.LOADED:
            self._forward(name)
        else:
            self._draw.choice(
                (self._finish, self._finish, self._finish, self._decode, self._insert)
            )(name)

    def _start(self, name: str) -> tuple[int, ...]:
        return self._agreed(f"start {name}", lambda rank: rank.engine.start(name))

    def _forward(self, name: str) -> None:
        page_s = self._draw.choice((0.001, 0.1, 1.0))
        arrived = self._do(
            f"forward {name}",  # ranks need not be equally fast
            lambda rank: rank.engine.forward(name, page_s * (1 + rank.engine.shard)),
        )
        self.tally["failed_loads"] += not all(arrived)

    def _decode(self, name: str) -> None:
        n_tokens = self._draw.randint(1, 2 * self.world.setup.page_size)
        tokens = pack_tokens([self._draw.randrange(2)] * n_tokens)
        if self._loads_settled(name):
            self._agreed(f"decode {name}", lambda rank: rank.engine.decode(name, tokens))

    def _insert(self, name: str) -> None:
        if self._loads_settled(name):
            draw = self._draw.random()
            is_received, keep_end = draw < 0.4, draw < 0.7
            step = f"insert {name} received={is_received} keep_end={keep_end}"
            self._agreed(
                step,
                lambda rank: rank.engine.insert(name, received=is_received, keep_end=keep_end),
            )

    def _finish(self, name: str) -> None:
        if self._loads_settled(name):
            self._agreed(f"finish {name}", lambda rank: rank.engine.finish(name))

    def _loads_settled(self, name: str) -> bool:
        good = self._agreed(
            f"settle loads for {name}", lambda rank: rank.engine.loads_settled(name)
        )
        self.tally["started_over"] += not good
        return good

    def _abort(self) -> None:
        if self._engine.requests:
            self._abort_one(self._draw.choice(list(self._engine.requests)))

    def _abort_one(self, request: str) -> None:
        self._agreed(f"abort {request}", lambda rank: rank.engine.abort(request))

    def _evict(self) -> None:
        n_pages = self._draw.randint(1, self.world.setup.device_pages)
        self._agreed(f"evict {n_pages}", lambda rank: rank.engine.cache.evict(n_pages))
        if self._engine.pool.groups and self._draw.random() < 0.5:
            n_units = self._draw.randint(1, self.world.setup.device_units)
            self._agreed(f"evict {n_units} units", lambda rank: rank.engine.units.evict(n_units))

    def _flush(self) -> None:
        timeout_s = self._draw.choice((0.0, 0.1, 20.0))
        self._agreed(f"flush {timeout_s} s", lambda rank: rank.engine.cache.flush(timeout_s))

    def _attach(self) -> None:
        name = self._draw.choice(STORES)
        self._do(f"attach {name}", lambda rank: rank.engine.cache.attach_storage(name, {}).name)

    def _detach(self) -> None:
        self._do("detach", lambda rank: rank.engine.cache.detach_storage())

    def _reset(self) -> None:
        self._agreed("reset", lambda rank: rank.engine.cache.reset())

    def _change_weather(self) -> None:
        rank = self._draw.randrange(self.world.setup.ranks)
        weather, new = self.world.weather[rank], Weather.drawn(self._draw)
        weather.delay_s, weather.error_rate = new.delay_s, new.error_rate
        weather.hang_rate, weather.damage_rate = new.hang_rate, new.damage_rate
        self._trace.add(self.world.clock.now, f"weather of rank {rank}", weather)

    def _trouble_in_the_store(self) -> None:
        """Objects vanish between exists and get, are damaged, or stand under another key."""
        draw = self._draw
        store = draw.choice(self._stores)
        keys = list(store.list_keys(""))
        for key in draw.sample(keys, draw.randint(0, min(3, len(keys)))):
            kind = draw.randrange(3)
            value = store.get(key)
            assert value is not None
            if kind == 0:
                store.delete([key])
            elif kind == 1:
                store.set(key, damaged(bytes(value), draw))
            else:
                store.set(draw.choice(keys), value)
        self._trace.add(self.world.clock.now, f"trouble in a store of {len(keys)} objects", "")

    # Helpers.

    @property
    def _engine(self) -> Engine:
        """Rank 0's, which knows the requests as every rank does."""
        return self._ranks[0].engine

    def _do(self, name: str, step: Callable[[Rank], T]) -> list[T]:
        """Does ``step`` on every rank; the results by rank."""
        self.doing = name
        self._is_touched = True
        results = self._lockstep.run(lambda rank: step(self._ranks[rank]))
        self._trace.add(self.world.clock.now, name, results[0])
        return results

    def _agreed(self, name: str, step: Callable[[Rank], T]) -> T:
        """Does ``step`` on every rank; the result, which must be the same on all.

        Raises:
            InvariantBroken: it is not.
        """
        results = self._do(name, step)
        if any(result != results[0] for result in results):
            raise InvariantBroken(f"ranks agree: {name} has the results {results}")
        return results[0]

    def _tally_groups(self, cache: Controller) -> None:
        paths, reads = cache._group_paths, cache._prefetch_path
        self.tally["steps_with_unit_backups"] += paths._n_backups > 0
        self.tally["steps_with_unit_stores"] += bool(paths._stores)
        self.tally["steps_with_unit_loads"] += bool(paths._loads)
        self.tally["steps_with_unit_reads"] += bool(reads and reads._units.n_running)
        for part in cache.parts.groups:
            pools = part.held.device, part.held.host
            self.tally["steps_with_units_let_go"] += any(it.n_let_go for it in pools if it)

    def _check(self) -> None:
        self._is_touched = False
        for rank in self._ranks:
            checks.check_rank(rank.engine, rank.workers, rank.replay)
            cache = rank.engine.cache
            self.tally["steps_with_orphaned_pages"] += cache._write_path.n_orphaned_pages > 0
            reads = cache._prefetch_path
            self.tally["steps_with_orphaned_reads"] += bool(reads and reads.n_orphaned_pages)
            self._tally_groups(cache)
        checks.check_ranks_agree([rank.engine for rank in self._ranks])
