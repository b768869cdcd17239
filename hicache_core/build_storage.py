"""The part of ``build`` that makes storage backends and what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hicache_core import dynamic, plugin_manager
from hicache_core.config import HiCacheConfig
from hicache_core.controller.admission import Admission, AlwaysAdmit, CostAware
from hicache_core.controller.storage_tier import Attachment
from hicache_core.page_keys import storage_namespace
from hicache_core.pools.host import HostPool
from hicache_core.ranks import RankGroup
from hicache_core.storage.base import RegistersMemory, StorageBackend
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.worker import StorageWorker
from hicache_core.types import BackendContext

DYNAMIC = "dynamic"

ADMISSIONS: dict[str, type[Admission]] = {"always": AlwaysAdmit, "cost_aware": CostAware}


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


class StorageOpener:
    """Makes attachments for one cache: the backend, seals, guard and worker.

    ``open`` may be called on any thread; it touches nothing of the owner's but the host pool's
    buffers, which do not change.
    """

    def __init__(
        self, config: HiCacheConfig, host: HostPool, ranks: RankGroup, clock: Callable[[], float]
    ) -> None:
        """Asks the other ranks what they hold, so it is called by every rank at the start."""
        self._config = config
        self._host = host
        self._clock = clock
        self._namespace = storage_namespace(
            host.spec.identity(), config.page_size, config.hicache_mem_layout
        )
        holders = ranks.gather(self._namespace)
        self._is_writer = holders.index(self._namespace) == ranks.rank
        self._context = BackendContext(
            self._namespace, host.object_nbytes, ranks.rank, ranks.world_size
        )

    def open(self, name: str, settings: Mapping[str, object]) -> Attachment:
        """See ``controller.storage_tier.OpenStorage``."""
        backend = backend_from(name, settings, self._context)
        backend.open()
        try:
            if isinstance(backend, RegistersMemory):
                backend.register_memory(self._host.buffers)
            sealed = SealedBackend(backend)
            worker = StorageWorker(
                sealed,
                n_threads=self._config.hicache_storage_threads,
                max_read_nbytes=self._config.hicache_storage_max_read_nbytes,
                max_write_nbytes=self._config.hicache_storage_max_write_nbytes,
                clock=self._clock,
            )
        except BaseException:
            backend.close()
            raise
        return Attachment(
            name,
            sealed,
            worker,
            self._namespace,
            is_writer=self._is_writer,
            admission=ADMISSIONS[self._config.prefetch_admission](),
            verdict=sealed.verdict,
        )
