"""The only place that picks concrete classes from a configuration."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from hicache_core import dynamic, plugin_manager
from hicache_core.config import HiCacheConfig
from hicache_core.controller.controller import Controller
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.parts import Clock, Parts
from hicache_core.controller.prefetch_policy import (
    BestEffort,
    PrefetchPolicy,
    Timeout,
    WaitComplete,
)
from hicache_core.controller.write_policy import WriteBack, WritePolicy, WriteThrough
from hicache_core.errors import SpecError
from hicache_core.kv_spec import KVSpec
from hicache_core.page_keys import storage_namespace
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.pools.limits import host_pages
from hicache_core.radix.eviction import eviction_policy
from hicache_core.radix.tree import RadixTree
from hicache_core.ranks import RankGroup, SingleRank
from hicache_core.storage.base import RegistersMemory, StorageBackend
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.worker import StorageWorker
from hicache_core.transfer.open import open_transfer
from hicache_core.types import BackendContext

log = logging.getLogger(__name__)

DYNAMIC = "dynamic"
GB = 1e9


def backend_from(
    name: str, settings: Mapping[str, object], context: BackendContext
) -> StorageBackend:
    """The named backend, made of its settings and not yet opened.

    Args:
        name: an installed plugin, or ``dynamic`` for a class that ``settings`` names.
        settings: the backend's own settings; an unknown key is an error.
        context: what it may know of the cache.

    Raises:
        PluginError: it is not installed, does not load, or is no backend.
        ConfigError: a setting is wrong.
    """
    if name == DYNAMIC:
        backend_class = dynamic.load_class(settings)
        _, settings = dynamic.split_settings(settings)
    else:
        backend_class = plugin_manager.backend_class(name)
    return backend_class(plugin_manager.backend_settings(backend_class, settings), context)


WRITE_POLICIES: dict[str, WritePolicy] = {
    "write_through": WriteThrough(threshold=1),
    "write_through_selective": WriteThrough(threshold=2),
    "write_back": WriteBack(),
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
            config: what is asked; the compatibility rules are applied here, each logged once.
            spec: what one token's KV is.
            device_pool: L1, the engine's own tensors or ours.
            clock: seconds, for deadlines.
            ranks: who decides together; alone if None.
            batch_pages: pages of one storage job at most.

        Raises:
            ConfigError, SpecError, NotEnoughMemory, PluginError, BackendError: whatever is wrong,
                before anything is left running.
        """
        in_force = config.resolve().in_force
        ranks = ranks or SingleRank()
        with contextlib.ExitStack() as undo:
            parts = _parts(in_force, spec, device_pool, ranks, undo)
            parts = replace(parts, clock=clock, batch_pages=batch_pages)
            if in_force.hicache_storage_backend is not None:
                parts = _with_storage(parts, in_force, undo)
            super().__init__(parts)
            undo.pop_all()


def _parts(
    config: HiCacheConfig,
    spec: KVSpec,
    device_pool: DevicePool,
    ranks: RankGroup,
    undo: contextlib.ExitStack,
) -> Parts:
    """Everything but storage."""
    if (device_pool.spec, device_pool.page_size) != (spec, config.page_size):
        raise SpecError(
            f"the device pool holds pages of {device_pool.page_size} tokens of {device_pool.spec}; "
            f"asked are pages of {config.page_size} tokens of {spec}"
        )
    tree = RadixTree(
        config.page_size,
        eviction_policy(config.radix_eviction_policy),
        eviction_policy(config.hicache_host_eviction_policy),
    )
    host, transfer = None, None
    if config.enable_hierarchical_cache:
        host = HostPool(
            spec,
            config.page_size,
            host_pages(
                ratio=config.hicache_ratio,
                size_gb=config.hicache_size,
                device_pages=device_pool.n_pages,
                page_nbytes=spec.page_nbytes(config.page_size),
            ),
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
        write_policy=WRITE_POLICIES[config.hicache_write_policy],
        prefetch_policy=prefetch_policy(config),
        jobs=JobTable(ranks),
        storage_namespace=storage_namespace(
            spec.identity(), config.page_size, config.hicache_mem_layout
        ),
        prefetch_threshold=config.controller_keys.prefetch_threshold,
    )


def _log_progress(done_nbytes: int, all_nbytes: int) -> None:
    """Says how far a large host pool has been faulted in."""
    log.info("host pool: %.0f of %.1f GB are ready", done_nbytes / GB, all_nbytes / GB)


def _with_storage(parts: Parts, config: HiCacheConfig, undo: contextlib.ExitStack) -> Parts:
    """The parts with an open backend, sealed, and the worker that drives it."""
    assert config.hicache_storage_backend is not None
    assert parts.host is not None
    context = BackendContext(parts.storage_namespace, object_nbytes=parts.host.object_nbytes)
    backend = backend_from(config.hicache_storage_backend, config.backend_config, context)
    backend.open()
    undo.callback(backend.close)
    if isinstance(backend, RegistersMemory):
        backend.register_memory(parts.host.buffers)
    sealed = SealedBackend(backend)
    worker = StorageWorker(
        sealed,
        n_threads=config.hicache_storage_threads,
        max_read_nbytes=config.hicache_storage_max_read_nbytes,
        max_write_nbytes=config.hicache_storage_max_write_nbytes,
        clock=parts.clock,
    )
    return replace(parts, backend=sealed, worker=worker)
