"""What the connector counts, in vLLM's logs and among its Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

BLOCKS = "hicache:blocks"
STORE_AVAILABLE = "hicache:store_available"


@dataclass
class ConnectorStats(KVConnectorStats):
    """What workers moved since the last report.

    ``data["blocks"]`` has the number of blocks by what became of them: ``loaded``, ``stored``,
    ``dropped``, and the kinds of refused ones. ``data["stores"]`` has 1 for each store that is
    called, and 0 for one whose circuit breaker is open.
    """

    def reset(self) -> None:
        # docstring inherited
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        # docstring inherited
        blocks, stores = dict(self.data.get("blocks", {})), dict(self.data.get("stores", {}))
        for outcome, n_blocks in other.data.get("blocks", {}).items():
            blocks[outcome] = blocks.get(outcome, 0) + n_blocks
        for store, is_available in other.data.get("stores", {}).items():
            stores[store] = min(stores.get(store, 1), is_available)
        self.data = {"blocks": blocks, "stores": stores}
        return self

    def reduce(self) -> dict[str, int | float]:
        # docstring inherited
        shown = {f"{outcome} blocks": n for outcome, n in self.data.get("blocks", {}).items()}
        return shown | {f"{name} available": n for name, n in self.data.get("stores", {}).items()}

    def is_empty(self) -> bool:
        # docstring inherited
        return not any(self.data.values())


class ConnectorMetrics(KVConnectorPromMetrics):
    """The Prometheus metrics ``hicache:blocks`` and ``hicache:store_available``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        """Registers them.

        Args:
            vllm_config: vLLM's whole configuration.
            metric_types: vLLM's kind of each of Prometheus' kinds.
            labelnames: vLLM's labels.
            per_engine_labelvalues: their values, for each engine.
        """
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._blocks = metric_types[Counter](
            name=BLOCKS,
            documentation="Blocks of the HiCache connector, by what became of them.",
            labelnames=[*labelnames, "outcome"],
        )
        self._available = metric_types[Gauge](
            name=STORE_AVAILABLE,
            documentation="1 if the store is called, 0 while its circuit breaker is open.",
            labelnames=[*labelnames, "store"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        # docstring inherited
        values = self.per_engine_labelvalues[engine_idx]
        for outcome, n_blocks in transfer_stats_data.get("blocks", {}).items():
            self._blocks.labels(*values, outcome).inc(n_blocks)
        for store, is_available in transfer_stats_data.get("stores", {}).items():
            self._available.labels(*values, store).set(is_available)
