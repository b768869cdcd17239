"""The io backend ``kernel`` on a CPU without the native module: vectorised torch."""

from __future__ import annotations

import math
from array import array

import torch

from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.transfer.base import (
    CopyLayers,
    CopyQueue,
    Direction,
    PageIds,
    Transfer,
    device_rows,
)

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


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
        self._device: list[list[torch.Tensor]] = []
        self._host: list[torch.Tensor] = []
        for component, layers in enumerate(device_pool.buffers):
            on_device = [device_rows(layer) for layer in layers]
            on_host = host_pool.rows(component)
            word = _widest_word([on_host, *on_device])
            self._device.append([rows.view(word) for rows in on_device])
            self._host.append(on_host.view(word))

    def _prepare(
        self, direction: Direction, device_pages: PageIds, host_pages: PageIds
    ) -> CopyLayers:
        device_index, host_index = index_of(device_pages), index_of(host_pages)

        def copy(layers: range) -> None:
            for layer in layers:
                for buffers, host_rows in zip(self._device, self._host, strict=True):
                    on_device, on_host = buffers[layer], host_rows[:, layer]
                    if direction is Direction.TO_HOST:
                        on_host.index_copy_(0, host_index, on_device.index_select(0, device_index))
                    else:
                        on_device.index_copy_(0, device_index, on_host.index_select(0, host_index))

        return copy


def index_of(pages: PageIds) -> torch.Tensor:
    """Page ids as an int64 tensor (n_pages,): a copy, so that the caller may reuse its array."""
    return torch.tensor(array("q", pages), dtype=torch.int64)


def _widest_word(tensors: list[torch.Tensor]) -> torch.dtype:
    """The widest integer in which all these bytes can be addressed: fewer elements to move."""
    unit = 8
    for tensor in tensors:
        unit = math.gcd(unit, tensor.shape[-1], int(tensor.storage_offset()), *tensor.stride()[:-1])
    return WORDS[unit]
