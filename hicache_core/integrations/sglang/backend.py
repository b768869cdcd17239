"""``HiCacheBackend``: any of our storage backends as the storage of SGLang's HiCache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Protocol

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics
from sglang.srt.runtime_context import get_model
from sglang.version import __version__ as sglang_version

from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.identity import model_identity
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.sglang import hits
from hicache_core.integrations.sglang.namespace import (
    ANCHOR,
    ServedModel,
    StorageConfig,
    arguments_of,
    is_shared,
    is_writer,
    namespace_of,
    rank_of,
)
from hicache_core.integrations.sglang.pools import HostPool, PoolPages, pages_of
from hicache_core.integrations.sglang.settings import check_version, read_settings
from hicache_core.integrations.sglang.store import PoolStore
from hicache_core.integrations.sglang.traffic import Traffic

_logger = logging.getLogger(__name__)


class PoolTransfer(Protocol):
    """What we use of SGLang's ``PoolTransfer``."""

    name: str
    host_indices: torch.Tensor | None
    keys: list[str] | None
    hit_policy: object
    block_pages: int
    group_pages: int


class HiCacheBackend(HiCacheStorage):  # type: ignore[misc]  # SGLang has no type hints to follow
    """Stores SGLang's pages in an installed storage backend of HiCache.

    SGLang makes it for ``--hicache-storage-backend dynamic``. The JSON beside it names this class,
    the backend and its settings (``SGLangSettings``).

    Construction and registration raise. After that no method raises: a store that fails, hangs or
    has damaged pages is a miss, and a page that was not stored is answered with False.

    Threads: SGLang calls from its prefetch, backup and scheduler threads at the same time.
    """

    def __init__(self, storage_config: StorageConfig, kwargs: Mapping[str, object]) -> None:
        """Reads the settings; the store is opened when the host pool is registered.

        Args:
            storage_config: SGLang's ``HiCacheStorageConfig``.
            kwargs: nothing in the supported versions.

        Raises:
            ConfigError: a setting is wrong, or the version of SGLang is not supported.
        """
        self._settings = read_settings(storage_config.extra_config)
        check_version(sglang_version, allow_untested=self._settings.allow_untested_version)
        if storage_config.should_split_heads:
            raise ConfigError("tp_lcm_size: sharing pages between TP sizes is not supported")
        self._config = storage_config
        self._model = _served_model(storage_config, self._settings.variant)
        self._store: PoolStore | None = None
        self._traffic = Traffic(counts=storage_config.enable_storage_metrics)

    def register_mem_pool_host(self, mem_pool_host: HostPool) -> None:
        """Opens the store for the pages of the host pool.

        Raises:
            SpecError: the pool has a layout or a shape that is not supported.
            PluginError: the backend is not installed, or does not load.
            ConfigError: one of its settings is wrong, or other ranks cannot find what this one
                stores.
            BackendError: it cannot be opened.
        """
        super().register_mem_pool_host(mem_pool_host)
        pages = pages_of(mem_pool_host, flat=not self._settings.interface_v1)
        config = self._config
        opened = open_store(
            self._settings.backend,
            self._settings.backend_config,
            object_nbytes=pages.nbytes,
            rank=rank_of(config),
            world_size=config.tp_size * config.pp_size * config.attn_cp_size,
            across_processes=config.is_mla_model and config.tp_size > 1,
        )
        self._store = PoolStore(opened, self._traffic)
        self._add(ANCHOR, pages)

    def register_mem_host_pool_v2(self, host_pool: HostPool, host_pool_name: str) -> None:
        """Takes a side pool, such as that of sliding windows. Its pages are objects of their own.

        Args:
            host_pool: SGLang's; the one that is registered already comes again as ``kv``.
            host_pool_name: of the pool in transfers.

        Raises:
            SpecError: the pool has a layout or a shape that is not supported.
        """
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool is not self.mem_pool_host:
            self._add(str(host_pool_name), pages_of(host_pool, flat=False))

    def close(self) -> None:
        """Closes the store; every question is a miss from then on."""
        if self._store is not None:
            self._store.close()

    def clear(self) -> bool:
        """Removes the pages of this rank's pools from the store, and no others.

        Returns:
            Whether the store could.
        """
        return self._store is not None and self._store.clear()

    def get_stats(self) -> StorageMetrics | None:
        """Returns pages and GB/s of each read and write since the last call, if SGLang counts."""
        moved = self._traffic.take()
        if moved is None:
            return None
        return StorageMetrics(**{entry.name: getattr(moved, entry.name) for entry in fields(moved)})

    def exists(self, key: str) -> bool:
        """Returns whether the page is stored."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: Sequence[str], extra_info: object = None) -> int:
        """Returns how many leading pages are stored.

        Args:
            keys: SGLang's page hashes, any number.
            extra_info: not needed: a page hash names its whole prefix.
        """
        return self._open.n_leading(ANCHOR, keys)

    # Interface v1: pages in the registered pool.

    def batch_get_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: object = None
    ) -> list[bool]:
        """Reads pages into the host pool.

        Args:
            keys: SGLang's page hashes.
            host_indices: slots of the pool, int64, ``page_size`` for each key.
            extra_info: not needed.

        Returns:
            For each key whether its page was read and verified.
        """
        return self._open.load(ANCHOR, keys, host_indices)

    def batch_set_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: object = None
    ) -> list[bool]:
        """Stores pages of the host pool. A page that is stored already is not written again.

        Args:
            keys: SGLang's page hashes.
            host_indices: slots of the pool, int64, ``page_size`` for each key.
            extra_info: not needed.

        Returns:
            For each key whether its page is stored.
        """
        return self._open.save(ANCHOR, keys, host_indices)

    # The generic path: pages as tensors, in the order of the pool's get_data_page().

    def get(
        self,
        key: str,
        target_location: torch.Tensor | None = None,
        target_sizes: object = None,
    ) -> torch.Tensor | None:
        """Reads a page.

        Args:
            key: SGLang's page hash.
            target_location: where to read to, contiguous; a new tensor if None.
            target_sizes: not needed.

        Returns:
            The page; None if it is not stored or is damaged.
        """
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: Sequence[str],
        target_locations: Sequence[torch.Tensor | None] | None = None,
        target_sizes: object = None,
    ) -> list[torch.Tensor | None]:
        """Reads several pages.

        Args:
            keys: SGLang's page hashes.
            target_locations: where to read to, contiguous; new tensors if None.
            target_sizes: not needed.

        Returns:
            The pages; None for each that is not stored or is damaged.
        """
        pages = self._open.pages(ANCHOR)
        if pages is None:
            return [None] * len(keys)
        given = target_locations or [None] * len(keys)
        empty = pages.pool.get_dummy_flat_data_page
        targets = [empty() if target is None else target for target in given]
        mask = self._open.load_tensors(ANCHOR, keys, targets)
        return [target if read else None for target, read in zip(targets, mask, strict=True)]

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Stores a page.

        Args:
            key: SGLang's page hash.
            value: the page.
            target_location: not needed.
            target_sizes: not needed.

        Returns:
            Whether it is stored.
        """
        return value is not None and self.batch_set([key], [value])

    def batch_set(
        self,
        keys: Sequence[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Stores several pages.

        Args:
            keys: SGLang's page hashes.
            values: the pages.
            target_locations: not needed.
            target_sizes: not needed.

        Returns:
            Whether all of them are stored.
        """
        return values is not None and all(self._open.save_tensors(ANCHOR, keys, values))

    # Interface v2: several pools.

    def batch_exists_v2(
        self,
        keys: Sequence[str],
        pool_transfers: Sequence[PoolTransfer] | None = None,
        extra_info: object = None,
    ) -> PoolTransferResult:
        """Finds the longest prefix that the host pool and all side pools can restore.

        Args:
            keys: SGLang's page hashes, any number.
            pool_transfers: the side pools and what each needs of a prefix.
            extra_info: not needed.
        """
        n_kv = self.batch_exists(keys)
        found: dict[str, int] = {ANCHOR: n_kv} if n_kv else {}
        lengths = list(range(1, n_kv + 1))
        for transfer in pool_transfers or []:
            if not lengths:
                break
            boundary, its_lengths = self._restorable(keys[:n_kv], transfer)
            if boundary:
                found[transfer.name] = boundary
            if its_lengths is not None:
                lengths = sorted(set(lengths).intersection(its_lengths))
        return PoolTransferResult(lengths[-1] if lengths else 0, found, lengths)

    def batch_get_v2(
        self, transfers: Sequence[PoolTransfer], extra_info: object = None
    ) -> dict[str, list[bool]]:
        """Reads pages into their pools.

        Args:
            transfers: pool, keys and slots, ``page_size`` of that pool for each key.
            extra_info: not needed.

        Returns:
            By pool, for each key whether its page was read and verified.
        """
        return {
            transfer.name: self._open.load(
                transfer.name, transfer.keys or [], transfer.host_indices
            )
            for transfer in transfers
        }

    def batch_set_v2(
        self, transfers: Sequence[PoolTransfer], extra_info: object = None
    ) -> dict[str, list[bool]]:
        """Stores pages of several pools.

        Args:
            transfers: pool, keys and slots, ``page_size`` of that pool for each key.
            extra_info: not needed.

        Returns:
            By pool, for each key whether its page is stored.
        """
        return {
            transfer.name: self._open.save(
                transfer.name, transfer.keys or [], transfer.host_indices
            )
            for transfer in transfers
        }

    @property
    def _open(self) -> PoolStore:
        assert self._store is not None, "SGLang registers the host pool before it uses the store"
        return self._store

    def _add(self, name: str, pages: PoolPages) -> None:
        namespace = namespace_of(self._config, pages, name, self._model)
        stores = not is_shared(self._config, pages, name) or is_writer(self._config)
        self._open.add(name, pages, namespace, stores=stores)
        _logger.info("pool %s: %s", name, namespace.described)

    def _restorable(
        self, keys: Sequence[str], transfer: PoolTransfer
    ) -> tuple[int, Sequence[int] | None]:
        """Returns how far a side pool reaches, and which prefixes it allows; None for any."""
        if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
            present = self._open.present(transfer.name, transfer.keys or [])
            return hits.block_groups(present, transfer.block_pages, transfer.group_pages), None
        present = self._open.present(transfer.name, keys)
        if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
            lengths = hits.trailing_pages(present, max(1, len(transfer.keys or ())))
        else:
            lengths = hits.all_pages(present)
        return max(lengths, default=0), lengths


def _served_model(config: StorageConfig, variant: str) -> ServedModel:
    """Finds out which model this process serves.

    Args:
        config: SGLang's.
        variant: of our settings.

    Raises:
        ConfigError: SGLang gives neither a path nor a name.
    """
    try:
        running = get_model()
    except ValueError:  # no engine runs in this process
        running = None
    name = getattr(running, "model_path", None) or config.model_name
    if not name:
        raise ConfigError(
            "SGLang gave its storage backend no model name; start it with --served-model-name"
        )
    arguments = arguments_of(running, variant)
    return ServedModel(model_identity(str(name)), arguments, sglang_version)
