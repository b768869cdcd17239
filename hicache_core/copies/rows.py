"""The rows of two pools as tensors of one integer type, so that bytes move whatever they mean."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool

Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""The rows of one component in one layer, on device and host: (n_pages, page_size, n) each."""
RowsByLayer: TypeAlias = list[list[Rows]]

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def device_rows(buffer: torch.Tensor) -> torch.Tensor:
    """A device buffer as bytes: uint8 (n_pages, page_size, row_nbytes), a view."""
    return buffer.view(*buffer.shape[:2], -1).view(torch.uint8)


def row_bytes(device_pool: DevicePool, host_pool: HostPool) -> RowsByLayer:
    """Views of all rows as bytes, layer by layer: the components that the layer has."""
    on_host = [host_pool.rows(c) for c in range(len(host_pool.spec.components))]
    return [
        [(device_rows(device_pool.buffers[c][at]), on_host[c][:, at]) for c, at in rows]
        for rows in map(device_pool.spec.components_in, range(device_pool.spec.num_layers))
    ]


def row_words(device_pool: DevicePool, host_pool: HostPool) -> RowsByLayer:
    """As ``row_bytes``, in the widest integer type in which both sides can be addressed.

    Wider words are fewer elements. Then one layer of a page has too few elements for torch to split
    a copy over its threads, which is slower from a thread of ours: 1.7 GB/s instead of 5.6 here.
    """
    return [
        [_in_words(on_device, on_host) for on_device, on_host in rows]
        for rows in row_bytes(device_pool, host_pool)
    ]


def _in_words(on_device: torch.Tensor, on_host: torch.Tensor) -> Rows:
    word = _widest_word([on_device, on_host])
    return on_device.view(word), on_host.view(word)


def _widest_word(tensors: list[torch.Tensor]) -> torch.dtype:
    """The widest that all addresses are multiples of: a GPU cannot read across that boundary."""
    unit = 8
    for tensor in tensors:
        # torch counts from the start of the storage, which an engine may have put anywhere.
        starts = int(tensor.storage_offset()), tensor.data_ptr()
        unit = math.gcd(unit, tensor.shape[-1], *starts, *tensor.stride()[:-1])
    return WORDS[unit]
