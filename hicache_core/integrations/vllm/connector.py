"""A KV connector of vLLM over a backend: blocks are read ahead of a request, stored behind it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.vllm.blocks import Blocks
from hicache_core.integrations.vllm.keys import check_version, connector_namespace
from hicache_core.integrations.vllm.logs import log_where_vllm_does
from hicache_core.integrations.vllm.metrics import ConnectorMetrics, ConnectorStats
from hicache_core.integrations.vllm.plans import Plans, Step
from hicache_core.integrations.vllm.settings import checked_settings, why_not
from hicache_core.integrations.vllm.worker import PageMover

logger = logging.getLogger(__name__)

_STATS_INTERVAL_S = 1.0


@dataclass
class StepMetadata(KVConnectorMetadata):
    """From the scheduler to the workers."""

    step: Step


@dataclass
class FetchedMetadata(KVConnectorWorkerMetadata):
    """From the workers to the scheduler: the leading pages that each worker holds, by fetch."""

    fetched: dict[int, list[int]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FetchedMetadata:
        # docstring inherited
        assert isinstance(other, FetchedMetadata)
        both = {fetch_id: list(counts) for fetch_id, counts in self.fetched.items()}
        for fetch_id, counts in other.fetched.items():
            both.setdefault(fetch_id, []).extend(counts)
        return FetchedMetadata(both)


class HiCacheConnector(KVConnectorBase_V1):
    """Loads the KV of known prefixes from a backend, and stores what vLLM computes.

    Only the workers have a store. A request that may have a stored prefix waits, while others run,
    until the workers have read its pages and verified them; what they hold is what vLLM is
    promised. So no promise fails, whatever ``kv_load_failure_policy`` is: a page that is lost,
    damaged or late was never promised, and is computed.

    Threads: vLLM makes one object in the scheduler's process and one in each worker's; each belongs
    to one thread.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Checks that this model can be cached, and opens the store in a worker.

        Args:
            vllm_config: vLLM's whole configuration; ours is ``kv_connector_extra_config``.
            role: of the process.
            kv_cache_config: which blocks the model has.

        Raises:
            ConfigError: a setting, the version, the model or its layout does not fit.
            PluginError: the backend is not installed or does not load.
            BackendError: the store cannot be opened.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        log_where_vllm_does()
        check_version(vllm.__version__)
        self._settings = checked_settings(
            self._kv_transfer_config.kv_connector_extra_config,
            hash_algorithm=vllm_config.cache_config.prefix_caching_hash_algo,
            environ=os.environ,
        )
        why_not(vllm_config, kv_cache_config, FullAttentionSpec)
        self._mover: PageMover | None = None
        self._plans: Plans | None = None
        self._next_stats_s = 0.0
        if role is KVConnectorRole.SCHEDULER:
            n_workers = vllm_config.parallel_config.world_size
            self._plans = Plans(vllm_config.cache_config.block_size, n_workers, time.monotonic)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a block that was not stored is computed again."""
        return False

    # In the scheduler

    def on_new_request(self, request: Any) -> None:
        # docstring inherited
        self._planner.begin(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        # docstring inherited
        if not self._kv_transfer_config.is_kv_consumer:
            return 0, False
        return self._planner.matched_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        # docstring inherited
        self._planner.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        # docstring inherited
        plans, n_new = self._planner, scheduler_output.num_scheduled_tokens
        state = scheduler_output.kv_connector_block_state
        computed = {
            request.req_id: request.num_computed_tokens
            for request in scheduler_output.scheduled_new_reqs
        }
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, n_computed in computed.items():
            plans.scheduled(request_id, n_computed, n_new[request_id], state.get_block_ids)
        step = plans.take_step()
        if not self._kv_transfer_config.is_kv_producer:
            step.saves.clear()
        return StepMetadata(step)

    def update_connector_output(self, connector_output: Any) -> None:
        # docstring inherited
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, FetchedMetadata):
            self._planner.fetched(found.fetched)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        # docstring inherited
        self._planner.finish(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Drops what was read ahead; the store keeps what it has, and a line in the log says so.

        Returns:
            True, though other engines may read what the store keeps: on False vLLM's ``sleep`` and
            ``pause_generation`` raise an error.
        """
        self._planner.forget_fetches()
        logger.info(
            "HiCache dropped what it had read ahead; the store keeps its pages, so changed weights "
            "need another model name or variant"
        )
        return True

    @property
    def _planner(self) -> Plans:
        assert self._plans is not None
        return self._plans

    # In a worker

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Opens the store for the blocks of this worker."""
        (group,) = self._kv_cache_config.kv_cache_groups
        blocks = Blocks(group.layer_names, kv_caches, self._kv_cache_config.num_blocks)
        namespace = connector_namespace(
            self._vllm_config,
            group,
            version=vllm.__version__,
            page_nbytes=blocks.page_nbytes,
            dtypes=sorted({str(kv_caches[name].dtype) for name in group.layer_names}),
            cuts=blocks.cuts,
            variant=self._settings.variant,
        )
        parallel = self._vllm_config.parallel_config
        store = open_store(
            self._settings.backend,
            self._settings.backend_config,
            object_nbytes=blocks.page_nbytes,
            rank=parallel.rank,
            world_size=parallel.world_size,
            across_processes=True,
        )
        self._mover = PageMover(store, store.describe(namespace), blocks, self._settings.host_bytes)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        # docstring inherited
        if self._mover is not None:
            self._mover.before_compute(self._step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        # docstring inherited
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        # docstring inherited
        return

    def wait_for_save(self) -> None:
        # docstring inherited
        if self._mover is not None:
            self._mover.after_compute(self._step)

    def build_connector_worker_meta(self) -> FetchedMetadata | None:
        # docstring inherited
        reports = self._mover.take_reports() if self._mover is not None else {}
        if not reports:
            return None
        return FetchedMetadata({fetch_id: [n] for fetch_id, n in reports.items()})

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        # docstring inherited
        now = time.monotonic()
        if self._mover is None or now < self._next_stats_s:
            return None
        self._next_stats_s = now + _STATS_INTERVAL_S
        blocks, stores = self._mover.take_counts(), self._mover.stores_available()
        return ConnectorStats({"blocks": dict(blocks), "stores": dict(stores)})

    def shutdown(self) -> None:
        # docstring inherited
        if self._mover is not None:
            self._mover.close()

    # In the front end

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        # docstring inherited
        return ConnectorStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorMetrics:
        # docstring inherited
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.step
