"""One rank's controller, put together as ``build`` does, of parts that a schedule drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from hicache_core.build.cache import RETENTIONS, WRITE_POLICIES
from hicache_core.build.storage import ADMISSIONS
from hicache_core.controller.attachment import Attachment
from hicache_core.controller.controller import Controller
from hicache_core.controller.explain import Explainer
from hicache_core.controller.jobs import JobTable, Settle
from hicache_core.controller.parts import GroupParts, Parts
from hicache_core.controller.policies import (
    BestEffort,
    Policies,
    PrefetchPolicy,
    Timeout,
    WaitComplete,
)
from hicache_core.controller.quarantine import Quarantine
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.copies import native
from hicache_core.copies.base import Ticket, Transfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.errors import BackendUnavailable
from hicache_core.kv.keys import storage_namespace
from hicache_core.observe.journal import Journals
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.pins import PinnedUnits
from hicache_core.radix.eviction import eviction_policy
from hicache_core.radix.holdings import Holdings
from hicache_core.radix.tree import RadixTree
from hicache_core.ranks.base import RankGroup
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import BackendContext
from tests.simulation.clock import InvariantBroken, Process, VirtualClock
from tests.simulation.copies import SimCopyQueue
from tests.simulation.engine import Engine
from tests.simulation.journal_replay import JournalReplay
from tests.simulation.link import Link, Weather
from tests.simulation.memory import device_pool, host_pools
from tests.simulation.setup import Setup
from tests.simulation.worker import SimWorker

STORES = ("east", "west")
"""Names of the stores that can be attached."""

PREFETCH_POLICIES: dict[str, PrefetchPolicy] = {
    "best_effort": BestEffort(),
    "wait_complete": WaitComplete(),
    "timeout": Timeout(0.5, 10.0),
}


class AuditedJobs(JobTable):
    """The table of jobs, which also counts how often each settles."""

    def __init__(self, ranks: RankGroup) -> None:
        """An empty table."""
        super().__init__(ranks)
        self.n_settled: dict[int, int] = {}

    def add(self, settle: Settle) -> int:
        # docstring inherited
        job_id = self._next_id
        self.n_settled[job_id] = 0
        return super().add(partial(self._settle_once, job_id, settle))

    def add_write(self, settle: Settle) -> int:
        # docstring inherited
        job_id = self._next_id
        self.n_settled[job_id] = 0
        return super().add_write(partial(self._settle_once, job_id, settle))

    def add_copy(self, ticket: Ticket, n_pages: int, settle: Settle) -> None:
        # docstring inherited
        job_id = self._next_id
        self.n_settled[job_id] = 0
        super().add_copy(ticket, n_pages, partial(self._settle_once, job_id, settle))

    def withdraw(self, job_id: int) -> None:
        # docstring inherited
        if job_id in self._lane.settle:  # else it is among those that are just being settled
            self._count(job_id)
        super().withdraw(job_id)

    @property
    def unsettled(self) -> list[int]:
        """Jobs that did not settle."""
        return [job_id for job_id, n in self.n_settled.items() if n == 0]

    def _settle_once(self, job_id: int, settle: Settle, n_pages: int) -> None:
        self._count(job_id)
        settle(n_pages)

    def _count(self, job_id: int) -> None:
        self.n_settled[job_id] += 1
        if self.n_settled[job_id] > 1:
            raise InvariantBroken(f"settle once: job {job_id} settles again")


@dataclass(slots=True)
class Rank:
    """One rank from a start to its end.

    Attributes:
        process: its tasks and events.
        engine: the requests, the controller, the device pool.
        jobs: its table of jobs.
        replay: what the journal was told.
        workers: of every storage that was attached, the latest last.
    """

    process: Process
    engine: Engine
    jobs: AuditedJobs
    replay: JournalReplay
    workers: list[SimWorker] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class World:
    """What outlives a process: time, chance, the weather of each rank, the store.

    Attributes:
        setup: sizes and policies.
        clock: the time.
        draw: decides everything that is left to chance.
        weather: by rank.
        share: what the names of the stores begin with.
        skews: how far each rank's clock is ahead, in seconds.
    """

    setup: Setup
    clock: VirtualClock
    draw: Random
    weather: list[Weather]
    share: str
    skews: list[float]

    def local_clock(self, rank: int) -> Callable[[], float]:
        """What ``rank`` believes the time to be."""
        skew_s = self.skews[rank]
        return lambda: self.clock.now + skew_s


def open_rank(world: World, group: RankGroup) -> Rank:
    """Starts the controller of one rank."""
    setup, rank = world.setup, group.rank
    process = Process(world.clock)
    device, (host, *group_hosts) = device_pool(setup, rank), host_pools(setup, rank)
    jobs = AuditedJobs(group)
    transfer = _transfer(world, process, device, host)
    policies = eviction_policy(setup.device_eviction), eviction_policy(setup.host_eviction)
    groups = [
        GroupParts(
            Holdings(
                kind,
                setup.page_size,
                policies,
                PinnedUnits(pool.allocator),
                PinnedUnits(group_host.allocator),
            ),
            pool,
            group_host,
            _transfer(world, process, pool, group_host),
        )
        for kind, pool, group_host in zip(
            device.spec.groups, device.groups, group_hosts, strict=True
        )
    ]
    opener = Opener(world, process, group, [host, *group_hosts])
    clock = world.local_clock(rank)
    explainer, replay = Explainer(clock), JournalReplay()
    parts = Parts(
        page_size=setup.page_size,
        tree=RadixTree(setup.page_size, *policies, [part.held for part in groups]),
        device=device,
        host=host,
        transfer=transfer,
        policies=Policies(
            WRITE_POLICIES[setup.write_policy],
            PREFETCH_POLICIES[setup.prefetch_policy],
            setup.prefetch_threshold,
        ),
        jobs=jobs,
        storage=StorageTier(jobs, Quarantine(jobs, host.allocator), opener.open, process.spawn),
        clock=clock,
        sleep=world.clock.advance,
        batch_pages=setup.batch_pages,
        retention=RETENTIONS[setup.retention],
        explainer=explainer,
        journal=Journals([explainer, replay]),
        groups=tuple(groups),
    )
    if setup.starts_with_storage:
        assert parts.storage is not None
        parts.storage.open(STORES[0], {})
    return Rank(
        process, Engine(Controller(parts), device, setup.shard(rank)), jobs, replay, opener.workers
    )


class Opener:
    """Opens a store as one rank reaches it: sealed, over a link, with a worker.

    Attributes:
        workers: of every store that was opened, the latest last.
    """

    def __init__(
        self, world: World, process: Process, group: RankGroup, hosts: Sequence[HostPool]
    ) -> None:
        """Asks the other ranks what they hold: of those with equal bytes, one writes.

        Args:
            world: time, chance, weather.
            process: of the rank.
            group: of the rank.
            hosts: pool of the full pages, then those of the groups.
        """
        self.workers: list[SimWorker] = []
        self._world = world
        self._process = process
        self._rank = group.rank
        self._object_nbytes = max(host.object_nbytes for host in hosts)
        setup, spec = world.setup, hosts[0].spec
        self._namespace = storage_namespace(spec.identity(), setup.page_size, setup.layout)
        self._group_namespaces = tuple(
            storage_namespace(group.identity(), host.page_size, setup.layout)
            for group, host in zip(spec.groups, hosts[1:], strict=True)
        )
        holders = group.gather(self._namespace)
        self._is_writer = holders.index(self._namespace) == group.rank

    def open(self, name: str, settings: Mapping[str, object]) -> Attachment:
        """See ``OpenStorage``; in a task it takes its time, and may fail."""
        world, setup = self._world, self._world.setup
        weather = world.weather[self._rank]
        if self._process.is_in_task:
            self._process.sleep(world.draw.random() * weather.delay_s)
            if world.draw.random() < weather.error_rate:
                raise BackendUnavailable("injected fault: the store cannot be opened")
        n_objects = setup.store_objects
        max_nbytes = None if n_objects is None else n_objects * self._object_nbytes * setup.ranks
        config = MemoryConfig(share=world.share + name, max_nbytes=max_nbytes)
        context = BackendContext(self._namespace, self._object_nbytes, self._rank, setup.ranks)
        memory = MemoryBackend(config, context, world.local_clock(self._rank))
        memory.open()
        sealed = SealedBackend(Link(memory, self._process, weather, world.draw))
        guarded = self._guarded(sealed)
        nbytes = setup.max_pages_in_flight * self._object_nbytes
        worker = SimWorker(
            guarded,
            world.clock,
            self._process,
            world.draw,
            n_threads=setup.n_threads,
            max_read_nbytes=nbytes,
            max_write_nbytes=nbytes,
            deadline_s=setup.deadline_s,
            may_write=self._is_writer,
        )
        self.workers.append(worker)
        return Attachment(
            name,
            guarded,
            worker,
            self._namespace,
            is_writer=self._is_writer,
            admission=ADMISSIONS[setup.admission](),
            verdict=sealed.verdict,
            group_namespaces=self._group_namespaces,
        )

    def _guarded(self, sealed: SealedBackend) -> StorageBackend:
        """With the guard, whose pauses and deadlines are virtual too, if the setup has one."""
        deadline_s = self._world.setup.deadline_s
        if deadline_s is None:
            return sealed
        config = GuardConfig(
            window_s=5.0,
            min_calls=3,
            open_s=1.0,
            max_open_s=4.0,
            negative_ttl_s=2.0,
            deadline_base_s=deadline_s,
            retry_base_s=0.01,
        )
        clock, process = self._world.clock, self._process
        return GuardedBackend(sealed, config, lambda: clock.now, process.sleep, self._world.draw)


def _transfer(world: World, process: Process, device: DevicePool, host: HostPool) -> Transfer:
    """An open one, with queues of its own."""
    loads = _copy_queue(world, process)
    stores = _copy_queue(world, process) if world.setup.two_queues else loads
    kind = native.NativeTransfer if native.IS_BUILT else KernelTransfer
    transfer = kind(device, host, loads, stores)
    transfer.open()
    return transfer


def _copy_queue(world: World, process: Process) -> SimCopyQueue:
    return SimCopyQueue(world.clock, process, world.draw, world.setup.copy_failure_rate)
