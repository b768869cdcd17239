"""The device pool of an engine as page memory."""

from __future__ import annotations

from typing import Any

import torch

from hicache_core.errors import SpecError
from hicache_core.kv_transfer.page_memory import PageMemory
from hicache_core.pools.device import DevicePool


def memory_of_pool(pool: DevicePool) -> PageMemory:
    """The pool's pages as bytes; nothing is copied.

    Raises:
        SpecError: the pool is not in memory that the CPU can address, or a layer has gaps.
    """
    if pool.device.type != "cpu":
        raise SpecError(
            f"KV is sent from host memory, but the device pool is on {pool.device}; prefill and "
            "decode apart run on the CPU only in this version"
        )
    return PageMemory(
        pool.spec,
        pool.page_size,
        pool.n_pages,
        [[_bytes_of(layer) for layer in layers] for layers in pool.buffers],
        tuple(memory_of_pool(group) for group in pool.groups),
    )


def _bytes_of(layer: torch.Tensor) -> memoryview:
    if not layer.is_contiguous():
        raise SpecError("the pages of a layer have gaps between them; KV cannot be sent from there")
    bytes_: Any = layer.flatten().view(torch.uint8).numpy()
    return memoryview(bytes_)
