"""The part of ``build`` that makes storage backends and their wrappers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hicache_core.build.backends import CHAIN, backend_from, checked, split_settings
from hicache_core.config.settings import HiCacheConfig
from hicache_core.controller.admission import Admission, AlwaysAdmit, CostAware
from hicache_core.controller.attachment import Attachment
from hicache_core.errors import ConfigError
from hicache_core.kv.keys import describe_namespace, namespace_digest
from hicache_core.observe.stores import backend_statuses, rejected_pages
from hicache_core.observe.usage import UsageWatch
from hicache_core.pools.host import HostPool
from hicache_core.ranks.base import RankGroup
from hicache_core.storage.base import RegistersMemory, StorageBackend
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.chain.capabilities import Link
from hicache_core.storage.chain.config import ChainConfig, StoreConfig
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.heads.cut import head_group_specs
from hicache_core.storage.heads.groups import HeadGroupBackend
from hicache_core.storage.manifest import manifest_page
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.storage.workers.executor import Deadlines, Worker
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import BackendContext, Page

Clock = Callable[[], float]

ADMISSIONS: dict[str, type[Admission]] = {"always": AlwaysAdmit, "cost_aware": CostAware}


@dataclass(frozen=True, slots=True)
class Composed:
    """A backend with its wrappers, not opened yet.

    Attributes:
        backend: the outermost wrapper.
        guards: the guard of each store, the nearest store first.
        seals: the seal of each store, in the same order.
        deadlines: how long a job on it may take.
        read_only: whether none of the stores is written to.
    """

    backend: StorageBackend
    guards: tuple[GuardedBackend, ...]
    seals: tuple[SealedBackend, ...]
    deadlines: Deadlines
    read_only: bool = False

    def verdict(self, key: str) -> str | None:
        """Why any store's object under ``key`` was refused; None if none was."""
        return next(filter(None, (seal.verdict(key) for seal in self.seals)), None)


def composed(
    name: str, settings: Mapping[str, object], context: BackendContext, clock: Clock
) -> Composed:
    """Makes the named backend with seal and guard; for ``chain``, each of its links.

    Args:
        name: an installed plugin, ``dynamic`` or ``chain``.
        settings: the backend's own settings, those of its guard under ``guard``, and ``read_only``.
        context: what the backend may know about the cache.
        clock: seconds, increasing.

    Raises:
        PluginError: a backend is not installed, does not load, or is not a backend.
        ConfigError: a setting is wrong.
    """
    if name != CHAIN:
        common, own = split_settings(settings)
        return _guarded(name, own, common, context, clock)
    config = checked(ChainConfig, settings, "chain.")
    parts = [_guarded(c.backend, c.config, c, context, clock) for c in config.links]
    links = [
        Link(c.label, part.backend, read_only=c.read_only)
        for c, part in zip(config.links, parts, strict=True)
    ]
    deadlines = Deadlines(
        sum(part.deadlines.base_s for part in parts),
        sum(part.deadlines.per_gib_s for part in parts),
    )

    limits = {id(part.backend): part.deadlines for part in parts}

    def make_worker(backend: StorageBackend, max_nbytes: int) -> Worker:
        return StorageWorker(
            backend,
            n_threads=1,
            max_read_nbytes=1,
            max_write_nbytes=max_nbytes,
            clock=clock,
            deadline=limits[id(backend)],
        )

    return Composed(
        ChainBackend(config, context, links, make_worker, clock),
        tuple(guard for part in parts for guard in part.guards),
        tuple(seal for part in parts for seal in part.seals),
        deadlines,
        read_only=all(part.read_only for part in parts),
    )


def _guarded(
    name: str,
    settings: Mapping[str, object],
    common: StoreConfig,
    context: BackendContext,
    clock: Clock,
) -> Composed:
    if common.read_only:
        context = replace(context, read_only=True)
    seal = SealedBackend(backend_from(name, settings, context))
    guard = GuardedBackend(seal, common.guard, clock)
    return Composed(guard, (guard,), (seal,), common.guard.deadlines, read_only=common.read_only)


class StorageOpener:
    """Makes attachments for one cache: backend, seal, guard, chain, worker.

    ``open`` may be called on any thread. Of the owner's state it uses only the buffers of the host
    pool, which do not change.
    """

    def __init__(
        self,
        config: HiCacheConfig,
        host: HostPool,
        ranks: RankGroup,
        holders: Sequence[str],
        clock: Clock,
        groups: Sequence[HostPool] = (),
    ) -> None:
        """Opens nothing yet.

        Args:
            config: in force.
            host: the pool whose pages are stored.
            ranks: for what a backend may know of this rank.
            holders: the storage namespace of each rank; of those that hold the same, the first
                writes.
            clock: seconds.
            groups: the host pools of the groups, whose units are stored too.
        """
        self._config = config
        self._host = host
        self._groups = tuple(groups)
        self._clock = clock
        self._namespace = holders[ranks.rank]
        self._described = _described(config, host, host.spec.identity())
        self._described_groups = tuple(
            _described(config, pool, group.identity())
            for group, pool in zip(host.spec.groups, groups, strict=True)
        )
        held = host.spec.heads[1] - host.spec.heads[0]
        self._head_group = config.storage_head_group or held
        parts = [host.spec]
        if self._head_group != held:
            if groups:
                raise ConfigError(
                    "storage_head_group cuts objects by heads, which this cache cannot do for a "
                    f"model with groups ({', '.join(group.name for group in host.spec.groups)}): "
                    "leave it out"
                )
            parts = head_group_specs(host.spec, self._head_group)
        self._n_groups = len(parts)
        self._is_writer = holders.index(self._namespace) == ranks.rank
        nbytes = [parts[0].page_nbytes(config.page_size), *(p.shape.page_nbytes for p in groups)]
        self._context = BackendContext(
            self._namespace,
            HEADER_NBYTES + max(nbytes),
            ranks.rank,
            ranks.world_size,
            least_nbytes=HEADER_NBYTES + min(filter(None, nbytes)) if groups else 0,
        )

    def open(self, name: str, settings: Mapping[str, object]) -> Attachment:
        """See ``controller.storage_tier.OpenStorage``."""
        made = composed(name, settings, self._context, self._clock)
        backend, verdict = self._with_head_groups(made)
        manifests = self._manifests()
        backend.open()
        try:
            registers = backend.capability(RegistersMemory)
            if registers is not None:
                buffers = [pool.buffers for pool in (self._host, *self._groups)]
                pages = [page for _, page in manifests]
                registers.register_memory([part for parts in (*buffers, *pages) for part in parts])
            worker = StorageWorker(
                backend,
                n_threads=self._config.hicache_storage_threads,
                max_read_nbytes=self._config.hicache_storage_max_read_nbytes,
                max_write_nbytes=self._config.hicache_storage_max_write_nbytes,
                clock=self._clock,
                deadline=made.deadlines,
            )
        except BaseException:
            backend.close()
            raise
        usage = UsageWatch(made.guards, time.monotonic)
        return Attachment(
            name,
            backend,
            worker,
            self._namespace,
            is_writer=self._is_writer,
            admission=ADMISSIONS[self._config.prefetch_admission](),
            verdict=verdict,
            statuses=lambda: backend_statuses(made.guards, usage.nbytes()),
            before_close=usage.close,
            rejected=lambda: rejected_pages(made.seals),
            manifests=manifests,
            group_namespaces=tuple(map(namespace_digest, self._described_groups)),
            read_only=made.read_only,
        )

    def _manifests(self) -> Sequence[tuple[str, Page]]:
        """Key and page of an object for each namespace that says what it means, where it fits."""
        if self._n_groups > 1:
            return ()  # among pages that are cut by heads it would be cut too, and say nothing
        made = []
        if self._host.shape.page_nbytes:
            made.append(manifest_page(self._described, self._host.object_nbytes))
        page_size, groups = self._config.page_size, self._host.spec.groups
        for described, pool, group in zip(
            self._described_groups, self._groups, groups, strict=True
        ):
            told = {"window": group.window, "page_size": page_size}
            made.append(manifest_page(described, pool.object_nbytes, told))
        return [manifest for manifest in made if manifest is not None]

    def _with_head_groups(
        self, made: Composed
    ) -> tuple[StorageBackend, Callable[[str], str | None]]:
        """What cuts pages by heads, where an object has fewer than a page; and its verdicts."""
        if self._n_groups == 1:
            return made.backend, made.verdict
        grouped = HeadGroupBackend(
            made.backend,
            self._host.spec,
            self._config.page_size,
            self._config.hicache_mem_layout,
            group=self._head_group,
            n_slots=2 * self._config.hicache_storage_threads,  # some may be with calls that hang
        )
        return grouped, lambda key: grouped.verdict(key, made.verdict)


def _described(config: HiCacheConfig, pool: HostPool, identity: Mapping[str, object]) -> str:
    return describe_namespace(identity, pool.page_size, config.hicache_mem_layout)
