"""An emulation of the copies between a GPU and host memory: vLLM's offloading on a CPU.

vLLM offers offloading on GPUs only. Everything but these copies is vLLM's own: the connector, its
scheduler, the manager of the tiers and the shared memory.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class TorchCopies(OffloadingWorker):
    """Copies blocks to rows and back with torch, at once."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._groups = kv_caches.group_data_refs
        self._blocks = [cache.tensor for cache in kv_caches.tensors]
        self._rows = [
            region.create_next_worker_view(cache.page_size_bytes * blocks_per_chunk)
            for cache in kv_caches.tensors
        ]
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False
    ) -> bool:
        return self._copy(job_id, dst_spec, src_spec, to_host=False)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """All copies have ended."""

    def shutdown(self) -> None:
        self._rows.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, device: Any, host: Any, *, to_host: bool) -> bool:
        began, nbytes = time.monotonic(), 0
        blocks, rows = iter(device.block_ids.tolist()), iter(host.block_ids.tolist())
        for group, (size, first) in enumerate(
            zip(device.group_sizes, device.block_indices, strict=True)
        ):
            row = -1
            for place in range(first, first + size):
                part = place % self._blocks_per_chunk
                if row < 0 or part == 0:
                    row = next(rows)
                nbytes += self._copy_block(group, next(blocks), row, part, to_host=to_host)
        self._finished.append(TransferResult(job_id, True, nbytes, time.monotonic() - began))
        return True

    def _copy_block(self, group: int, block: int, row: int, part: int, *, to_host: bool) -> int:
        nbytes = 0
        for ref in self._groups[group]:
            on_device = self._blocks[ref.tensor_idx][block]
            size = on_device.numel()
            on_host = self._rows[ref.tensor_idx][row, part * size : (part + 1) * size]
            into, source = (on_host, on_device) if to_host else (on_device, on_host)
            into.copy_(source)
            nbytes += size
        return nbytes


class CpuTieringSpec(TieringOffloadingSpec):
    """vLLM's spec, with the emulated copies."""

    def get_worker(self, kv_caches: Any) -> TorchCopies:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = TorchCopies(kv_caches, self.blocks_per_chunk, region)
        return self._worker
