"""The io backend ``direct``: a plain copy for each page, layer and component."""

from __future__ import annotations

import torch

from hicache_core.copies.base import CopyLayers, CopyQueue, Direction, PageIds, Transfer
from hicache_core.copies.rows import row_words
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool


class DirectTransfer(Transfer):
    """``Tensor.copy_`` of one page of one layer at a time, for every device.

    On CUDA each becomes a DMA copy, which leaves the processors to compute. It suits layouts in
    which a layer of a page is contiguous: ``layer_first`` and ``page_first_direct``.
    """

    def __init__(
        self,
        device_pool: DevicePool,
        host_pool: HostPool,
        queue: CopyQueue,
        store_queue: CopyQueue | None = None,
    ) -> None:
        # docstring inherited
        super().__init__(device_pool, host_pool, queue, store_queue)
        self._rows = row_words(device_pool, host_pool)

    def _prepare(
        self, direction: Direction, device_pages: PageIds, host_pages: PageIds
    ) -> CopyLayers:
        pairs = list(zip(device_pages, host_pages, strict=True))

        def copy(layers: range) -> None:
            for layer in layers:
                for on_device, on_host in self._rows[layer]:
                    # With gaps between rows, torch copies through memory that is not pinned.
                    at_once = _is_one_run(on_device) and _is_one_run(on_host)
                    for device_page, host_page in pairs:
                        if direction is Direction.TO_HOST:
                            on_host[host_page].copy_(on_device[device_page], non_blocking=at_once)
                        else:
                            on_device[device_page].copy_(on_host[host_page], non_blocking=at_once)

        return copy


def _is_one_run(rows: torch.Tensor) -> bool:
    """Whether a page of rows (n_pages, page_size, n) is contiguous."""
    return rows.stride(1) == rows.shape[2]
