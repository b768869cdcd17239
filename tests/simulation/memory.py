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
    spec = setup.spec(rank)
    groups = [
        DevicePool(
            group.spec,
            page_size := group.page_size(setup.page_size),
            setup.device_units,
            buffers=_buffers(group.spec, page_size, setup.device_units, rank, group.name),
        )
        for group in spec.groups
    ]
    buffers = _buffers(spec, setup.page_size, setup.device_pages, rank, "")
    return DevicePool(spec, setup.page_size, setup.device_pages, buffers=buffers, groups=groups)


def _buffers(
    spec: KVSpec, page_size: int, n_pages: int, rank: int, group: str
) -> list[list[torch.Tensor]]:
    buffers = _known_buffers(spec, page_size, n_pages, rank, group)
    for layers in buffers:
        for layer in layers:
            layer.zero_()
    return buffers


def host_pools(setup: Setup, rank: int) -> list[HostPool]:
    """Bytes that are no page: the pool of full pages, then those of the groups.

    At most one pool of a rank and group may be in use.
    """
    spec = setup.spec(rank)
    pages = _host_pool(spec, setup.page_size, setup.host_pages, setup.layout, rank, "")
    units = [
        _host_pool(
            group.spec,
            group.page_size(setup.page_size),
            setup.host_units,
            setup.layout,
            rank,
            group.name,
        )
        for group in spec.groups
    ]
    return [_fresh(pool) for pool in (pages, *units)]


def _fresh(known: HostPool) -> HostPool:
    known.buffers[0][:] = b"\xa5" * known.nbytes
    pool = copy(known)
    pool.allocator = PageAllocator(pool.n_pages)
    return pool


@cache
def _known_buffers(
    spec: KVSpec,
    page_size: int,
    n_pages: int,
    rank: int,
    group: str,
) -> list[list[torch.Tensor]]:
    return [
        [
            torch.zeros(n_pages, page_size, *component.shape, dtype=getattr(torch, component.dtype))
            for _ in spec.layers_of(component)
        ]
        for component in spec.components
    ]


@cache
def _host_pool(
    spec: KVSpec,
    page_size: int,
    n_pages: int,
    layout: str,
    rank: int,
    group: str,
) -> HostPool:
    return HostPool(spec, page_size, n_pages, LAYOUTS[layout])
