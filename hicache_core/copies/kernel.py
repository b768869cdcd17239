"""The io backend ``kernel`` on a CPU without the native module: vectorised torch."""

from __future__ import annotations

from array import array

import torch

from hicache_core.copies.base import CopyLayers, CopyQueue, Direction, PageIds, Transfer
from hicache_core.copies.rows import row_words
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool


class KernelTransfer(Transfer):
    """One gather and one scatter for each layer and component, over all pages at once."""

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
        device_index, host_index = index_of(device_pages), index_of(host_pages)

        def copy(layers: range) -> None:
            for layer in layers:
                for on_device, on_host in self._rows[layer]:
                    if direction is Direction.TO_HOST:
                        on_host.index_copy_(0, host_index, on_device.index_select(0, device_index))
                    else:
                        on_device.index_copy_(0, device_index, on_host.index_select(0, host_index))

        return copy


def index_of(pages: PageIds) -> torch.Tensor:
    """Page ids as an int64 tensor (n_pages,): a copy, so that the caller may reuse its array."""
    return torch.tensor(array("q", pages), dtype=torch.int64)
