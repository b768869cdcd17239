"""The only place that picks concrete classes from a configuration."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hicache_core.build.observers import Observers
from hicache_core.build.storage import StorageOpener, backend_from
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import EXTRA
from hicache_core.controller.controller import Controller
from hicache_core.controller.explain import Explanation
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.parts import Clock, Parts
from hicache_core.controller.policies import (
    BestEffort,
    FreeOnceStored,
    HostRetention,
    KeepOnHost,
    Policies,
    PrefetchPolicy,
    Timeout,
    WaitComplete,
    WriteBack,
    WritePolicy,
    WriteThrough,
)
from hicache_core.controller.quarantine import Quarantine
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.copies.open import open_transfer
from hicache_core.errors import ConfigError, RankLost, SpecError
from hicache_core.kv.keys import storage_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.observe.snapshot import CacheSnapshot
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.pools.limits import host_pages
from hicache_core.radix.eviction import eviction_policy
from hicache_core.radix.picture import TreePicture, take_picture
from hicache_core.radix.tree import RadixTree
from hicache_core.ranks.base import RankGroup, SingleRank, agree_all

__all__ = ["HiCache", "backend_from", "prefetch_policy"]

log = logging.getLogger(__name__)

GB = 1e9


WRITE_POLICIES: dict[str, WritePolicy] = {
    "write_through": WriteThrough(threshold=1),
    "write_through_selective": WriteThrough(threshold=2),
    "write_back": WriteBack(),
}

RETENTIONS: dict[str, HostRetention] = {
    "keep": KeepOnHost(),
    "free_once_stored": FreeOnceStored(),
}


def prefetch_policy(config: HiCacheConfig) -> PrefetchPolicy:
    """The policy that the configuration names, with its times."""
    keys = config.controller_keys
    policies: dict[str, PrefetchPolicy] = {
        "best_effort": BestEffort(),
        "wait_complete": WaitComplete(),
        "timeout": Timeout(keys.prefetch_timeout_base, keys.prefetch_timeout_per_ki_token),
    }
    return policies[config.hicache_storage_prefetch_policy]


class HiCache(Controller):
    """A prefix cache of three tiers, made from a configuration. See ``Controller`` for its use::

    with HiCache(config, spec, device_pool) as cache:
        match = cache.match_prefix(tokens)
    """

    def __init__(
        self,
        config: HiCacheConfig,
        spec: KVSpec,
        device_pool: DevicePool,
        *,
        clock: Clock = time.monotonic,
        ranks: RankGroup | None = None,
        batch_pages: int = 128,
    ) -> None:
        """Builds the pools, opens the storage backend and starts the threads.

        Args:
            config: the settings asked for; the compatibility rules are applied here.
            spec: the KV of one token.
            device_pool: L1, over the engine's own tensors or new ones.
            clock: seconds, increasing, for deadlines.
            ranks: the ranks of this cache; None for a single process.
            batch_pages: pages in one storage job at most.

        Raises:
            ConfigError, SpecError, NotEnoughMemory, PluginError, BackendError: the cache cannot be
                opened; nothing is left running.
        """
        in_force = config.resolve().in_force
        ranks = ranks or SingleRank()
        _check_alike(ranks, in_force, batch_pages)
        n_host_pages = _agreed_pages(in_force, spec, device_pool, ranks)
        namespace = storage_namespace(
            spec.identity(), in_force.page_size, in_force.hicache_mem_layout
        )
        holders = ranks.gather(namespace)
        with contextlib.ExitStack() as undo:
            with _together(ranks):
                parts = _parts(in_force, device_pool, n_host_pages, ranks, undo)
                parts = replace(parts, clock=clock, batch_pages=batch_pages)
                if parts.host is not None:
                    opener = StorageOpener(in_force, parts.host, ranks, holders, clock)
                    parts = _with_storage(parts, in_force, opener, undo)
                observers = Observers(in_force, clock, ranks.rank)
                undo.callback(observers.close)
                observers.open()
            super().__init__(observers.watching(parts))
            self._observers = observers
            observers.begin(self)  # the cache is whole: nobody could see it before
            undo.pop_all()

    def poll(self) -> None:
        # docstring inherited
        super().poll()
        self._observers.polled(self._parts.tree)

    def picture(self) -> TreePicture:
        """The largest and the most used nodes of the tree, as counts. Owner thread."""
        self.owner.check()
        return take_picture(self._parts.tree)

    @property
    def status_url(self) -> str | None:
        """Where the status server answers, such as ``http://127.0.0.1:9477``; None without one."""
        return self._observers.status_url

    def recent(self, limit: int) -> Sequence[Explanation]:
        """The records of the latest requests, newest first; may be called on any thread."""
        return self._observers.recent(limit)

    def set_policies(self, values: Mapping[str, object]) -> None:
        """Changes the policies that can change while requests run, from the next decision on.

        Owner thread; every rank makes the same call.

        Args:
            values: a configuration. Only ``hicache_write_policy``, the prefetch policy with its
                times, and ``prefetch_threshold`` are used.

        Raises:
            ConfigError: a value is not allowed; nothing has changed.
        """
        self.owner.check()
        config = HiCacheConfig.load(arguments=values)
        policies = self._parts.policies
        policies.write = WRITE_POLICIES[config.hicache_write_policy]
        policies.prefetch = prefetch_policy(config)
        policies.prefetch_threshold = config.controller_keys.prefetch_threshold

    def snapshot(self) -> CacheSnapshot:
        # docstring inherited
        return self._observers.complete(super().snapshot())

    def close(self, timeout_s: float = 10.0) -> None:
        # docstring inherited
        super().close(timeout_s)
        if not self.owner.is_forked:
            self._observers.close()


@contextlib.contextmanager
def _together(ranks: RankGroup) -> Iterator[None]:
    """A step of opening that must succeed on every rank; enters one collective.

    Raises:
        RankLost: it succeeded here, and failed on another rank.
    """
    try:
        yield
    except BaseException:
        agree_all(ranks, [0])
        raise
    if agree_all(ranks, [1]) != [1]:
        raise RankLost("another rank could not open its cache; see the error of that rank")


def _check_alike(ranks: RankGroup, config: HiCacheConfig, batch_pages: int) -> None:
    """Checks that all ranks have the settings that they need to decide alike.

    Raises:
        ConfigError: another rank has other settings; the message names the first that differs.
    """
    own = config.model_dump(mode="json", exclude={"hicache_size", "hicache_ratio", EXTRA})
    own |= config.controller_keys.model_dump() | {"batch_pages": batch_pages}
    for rank, text in enumerate(ranks.gather(json.dumps(own))):
        other = json.loads(text)
        for key, value in own.items():
            if other[key] != value:
                raise ConfigError(
                    f"{key} is {value} on rank {ranks.rank} and {other[key]} on rank {rank}: all "
                    "ranks of a cache need the same settings"
                )


def _agreed_pages(
    config: HiCacheConfig, spec: KVSpec, device_pool: DevicePool, ranks: RankGroup
) -> int:
    """Pages of the host pool: as many as fit on the rank with the least room; 0 if there is none.

    Raises:
        ConfigError: the device pools of the ranks differ, so that they could not evict alike.
        SpecError: the device pool does not fit the spec, or a rank has no room for a page.
    """
    n_device = device_pool.n_pages
    n_host, error = 0, _misfit(config, spec, device_pool)
    if config.enable_hierarchical_cache and error is None:
        try:
            n_host = host_pages(
                ratio=config.hicache_ratio,
                size_gb=config.hicache_size,
                device_pages=n_device,
                page_nbytes=spec.page_nbytes(config.page_size),
            )
        except SpecError as failed:
            error = failed
    n_agreed, is_well, least, minus_most = agree_all(
        ranks, [n_host, int(error is None), n_device, -n_device]
    )
    if error is not None:
        raise error
    if not is_well:
        raise SpecError("the pools of another rank do not fit; see the error of that rank")
    if least != -minus_most:
        raise ConfigError(
            f"rank {ranks.rank} has {n_device} device pages, others have {least} to "
            f"{-minus_most}: all ranks of a cache need device pools of the same size"
        )
    if n_agreed < n_host:
        log.warning(
            "the host pool has %d pages instead of %d: another rank has no room for more",
            n_agreed,
            n_host,
        )
    return n_agreed


def _misfit(config: HiCacheConfig, spec: KVSpec, device_pool: DevicePool) -> SpecError | None:
    if (device_pool.spec, device_pool.page_size) == (spec, config.page_size):
        return None
    return SpecError(
        f"the device pool has pages of {device_pool.page_size} tokens of {device_pool.spec}, but "
        f"the cache needs pages of {config.page_size} tokens of {spec}"
    )


def _parts(
    config: HiCacheConfig,
    device_pool: DevicePool,
    n_host_pages: int,
    ranks: RankGroup,
    undo: contextlib.ExitStack,
) -> Parts:
    """All parts of the cache except storage."""
    tree = RadixTree(
        config.page_size,
        eviction_policy(config.radix_eviction_policy),
        eviction_policy(config.hicache_host_eviction_policy),
    )
    host, transfer = None, None
    if n_host_pages:
        host = HostPool(
            device_pool.spec,
            config.page_size,
            n_host_pages,
            LAYOUTS[config.hicache_mem_layout],
            pin=device_pool.device.type == "cuda",
            progress=_log_progress,
        )
        undo.callback(host.close)
        transfer = open_transfer(config.hicache_io_backend, device_pool, host)
        undo.callback(transfer.close)
    return Parts(
        page_size=config.page_size,
        tree=tree,
        device=device_pool,
        host=host,
        transfer=transfer,
        policies=Policies(
            WRITE_POLICIES[config.hicache_write_policy],
            prefetch_policy(config),
            config.controller_keys.prefetch_threshold,
        ),
        jobs=JobTable(ranks),
        storage=None,
        retention=RETENTIONS[config.hicache_host_retention],
    )


def _log_progress(done_nbytes: int, all_nbytes: int) -> None:
    """Logs how much of a large host pool has been faulted in."""
    log.info("host pool: %.1f of %.1f GB are ready", done_nbytes / GB, all_nbytes / GB)


def _with_storage(
    parts: Parts, config: HiCacheConfig, opener: StorageOpener, undo: contextlib.ExitStack
) -> Parts:
    """Adds the L3 tier to the parts, with the backend that the configuration names attached."""
    assert parts.host is not None
    quarantine = Quarantine(parts.jobs, parts.host.allocator)
    storage = StorageTier(parts.jobs, quarantine, opener.open)
    if config.hicache_storage_backend is not None:
        storage.open(config.hicache_storage_backend, config.backend_config)
        undo.callback(storage.close, 0.0)
    return replace(parts, storage=storage)
