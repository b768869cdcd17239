"""One rank's controller, put together as ``build`` does, of parts that a schedule drives."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from random import Random

import torch

from hicache_core.build import WRITE_POLICIES
from hicache_core.controller.controller import Controller
from hicache_core.controller.jobs import JobTable, Settle
from hicache_core.controller.parts import Parts
from hicache_core.controller.prefetch_policy import (
    BestEffort,
    PrefetchPolicy,
    Timeout,
    WaitComplete,
)
from hicache_core.kv_spec import KVSpec
from hicache_core.page_keys import storage_namespace
from hicache_core.pools.allocator import PageAllocator
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.radix.eviction import eviction_policy
from hicache_core.radix.tree import RadixTree
from hicache_core.ranks import RankGroup
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.testing.simulation.clock import InvariantBroken, Process, VirtualClock
from hicache_core.testing.simulation.copies import SimCopyQueue
from hicache_core.testing.simulation.engine import Engine
from hicache_core.testing.simulation.link import Link, Weather
from hicache_core.testing.simulation.setup import Setup
from hicache_core.testing.simulation.worker import SimWorker
from hicache_core.transfer import native
from hicache_core.transfer.kernel import KernelTransfer
from hicache_core.types import BackendContext

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
        def audited(n_pages: int) -> None:
            self.n_settled[job_id] += 1
            if self.n_settled[job_id] > 1:
                raise InvariantBroken(f"settle once: job {job_id} settles again")
            settle(n_pages)

        job_id = super().add(audited)
        self.n_settled[job_id] = 0
        return job_id


@dataclass(slots=True)
class Rank:
    """One rank from a start to its end.

    Attributes:
        process: its tasks and events.
        engine: the requests, the controller, the device pool.
        jobs: its table of jobs.
        workers: of every storage that was attached, the latest last.
    """

    process: Process
    engine: Engine
    jobs: AuditedJobs
    workers: list[SimWorker] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class World:
    """What outlives a process: time, chance, the weather of each rank, the store.

    Attributes:
        setup: sizes and policies.
        clock: the time.
        draw: decides everything that is left to chance.
        weather: by rank.
        share: the name of the store.
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
    spec = setup.spec(rank)
    device = _device_pool(spec, setup)
    host = _host_pool(spec, setup)
    jobs = AuditedJobs(group)
    namespace = storage_namespace(spec.identity(), setup.page_size, setup.layout)
    loads = _copy_queue(world, process)
    stores = _copy_queue(world, process) if setup.two_queues else loads
    kind = native.NativeTransfer if native.IS_BUILT else KernelTransfer
    transfer = kind(device, host, loads, stores)
    transfer.open()
    tree = RadixTree(
        setup.page_size, eviction_policy(setup.device_eviction), eviction_policy(setup.host_eviction)
    )
    sealed, worker = open_storage(world, process, rank, namespace, host.object_nbytes)
    parts = Parts(
        page_size=setup.page_size,
        tree=tree,
        device=device,
        host=host,
        transfer=transfer,
        write_policy=WRITE_POLICIES[setup.write_policy],
        prefetch_policy=PREFETCH_POLICIES[setup.prefetch_policy],
        jobs=jobs,
        storage_namespace=namespace,
        prefetch_threshold=setup.prefetch_threshold,
        backend=sealed,
        worker=worker,
        clock=world.local_clock(rank),
        batch_pages=setup.batch_pages,
    )
    return Rank(process, Engine(Controller(parts), device, rank), jobs, [worker])


def open_storage(
    world: World, process: Process, rank: int, namespace: str, object_nbytes: int
) -> tuple[SealedBackend, SimWorker]:
    """The store as one rank reaches it, sealed, and the worker that drives it."""
    setup = world.setup
    n_objects = setup.store_objects
    config = MemoryConfig(
        share=world.share,
        max_nbytes=None if n_objects is None else n_objects * object_nbytes * setup.ranks,
    )
    context = BackendContext(namespace, object_nbytes, rank, setup.ranks)
    memory = MemoryBackend(config, context, world.local_clock(rank))
    memory.open()
    sealed = SealedBackend(Link(memory, process, world.weather[rank], world.draw))
    worker = SimWorker(
        sealed,
        world.clock,
        process,
        world.draw,
        n_threads=setup.n_threads,
        max_read_nbytes=setup.max_pages_in_flight * object_nbytes,
        max_write_nbytes=setup.max_pages_in_flight * object_nbytes,
        deadline_s=setup.deadline_s,
    )
    return sealed, worker


def _device_pool(spec: KVSpec, setup: Setup) -> DevicePool:
    """Tensors of this size are cheaper from torch than from a mapping of their own."""
    shape = (setup.device_pages, setup.page_size)
    buffers = [
        [
            torch.zeros(*shape, *component.shape, dtype=getattr(torch, component.dtype))
            for _ in range(spec.num_layers)
        ]
        for component in spec.components
    ]
    return DevicePool.from_buffers(spec, setup.page_size, buffers)


@cache
def _mapped_host_pool(spec: KVSpec, page_size: int, n_pages: int, layout: str) -> HostPool:
    return HostPool(spec, page_size, n_pages, LAYOUTS[layout])


def _host_pool(spec: KVSpec, setup: Setup) -> HostPool:
    """A pool over memory that earlier schedules used: to map it takes longer than a schedule.

    It is filled with the same bytes each time, since a schedule must be a function of its seed.
    """
    mapped = _mapped_host_pool(spec, setup.page_size, setup.host_pages, setup.layout)
    mapped.buffers[0][:] = b"\xa5" * mapped.nbytes
    pool = copy(mapped)
    pool.allocator = PageAllocator(pool.n_pages)
    return pool


def _copy_queue(world: World, process: Process) -> SimCopyQueue:
    return SimCopyQueue(world.clock, process, world.draw, world.setup.copy_failure_rate)
