"""The pools of one rank, over memory that earlier schedules used: to make it takes longer than
to live in it.

It is filled with the same bytes each time, since a schedule must be a function of its seed.
"""

from __future__ import annotations

from copy import copy
from functools import cache

import torch

from hicache_core.kv.spec import KVSpec
from hicache_core.pools.allocator import PageAllocator
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from tests.simulation.setup import Setup


def device_pool(setup: Setup, rank: int) -> DevicePool:
    """Zeros; at most one pool of a rank may be in use."""
    known = _device_pool(setup.spec(rank), setup.page_size, setup.device_pages, rank)
    for layers in known.buffers:
        for layer in layers:
            layer.zero_()
    pool = copy(known)
    pool.allocator = PageAllocator(pool.n_pages)
    return pool


def host_pool(setup: Setup, rank: int) -> HostPool:
    """Bytes that are no page; at most one pool of a rank may be in use."""
    known = _host_pool(setup.spec(rank), setup.page_size, setup.host_pages, setup.layout, rank)
    known.buffers[0][:] = b"\xa5" * known.nbytes
    pool = copy(known)
    pool.allocator = PageAllocator(pool.n_pages)
    return pool


@cache
def _device_pool(spec: KVSpec, page_size: int, n_pages: int, rank: int) -> DevicePool:
    buffers = [
        [
            torch.zeros(n_pages, page_size, *component.shape, dtype=getattr(torch, component.dtype))
            for _ in range(spec.num_layers)
        ]
        for component in spec.components
    ]
    return DevicePool.from_buffers(spec, page_size, buffers)


@cache
def _host_pool(spec: KVSpec, page_size: int, n_pages: int, layout: str, rank: int) -> HostPool:
    return HostPool(spec, page_size, n_pages, LAYOUTS[layout])
