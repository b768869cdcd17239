"""Copies between device and host pages, against one contiguous ``copy_`` of the same bytes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator

import torch

from benchmarks.harness import Row, measure
from hicache_core.copies import native
from hicache_core.copies.base import Transfer
from hicache_core.copies.direct import DirectTransfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.native import NativeTransfer
from hicache_core.copies.queues import ThreadQueue
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.pools.mapping import map_memory

PAGE_SIZE = 64
SPEC = KVSpec.mha(
    num_layers=32, num_heads=8, head_dim=128, dtype="bfloat16", fingerprint="benchmark"
)
TARGETS = {"page_first_direct": "80 %", "page_first": "65 %", "layer_first": "80 %"}
BASELINE = "contiguous copy_"


def rows(quick: bool) -> Iterator[Row]:
    """Both ways, every layout, by the native module and by its twins in torch.

    A table for each layout, so that its plain copy is measured right beside it.
    """
    n_pages = 16 if quick else 64
    repeat = 3 if quick else 7
    kinds: list[tuple[str, type[Transfer]]] = [
        ("direct (torch)", DirectTransfer),
        ("kernel (torch)", KernelTransfer),
    ]
    if native.IS_BUILT:
        kinds.insert(0, ("direct or kernel (native)", NativeTransfer))
    device = DevicePool(SPEC, PAGE_SIZE, n_pages + n_pages // 2)
    for layout in TARGETS:
        table = f"transfer, {layout}, {n_pages} pages of {SPEC.page_nbytes(PAGE_SIZE) >> 20} MiB"
        yield _plain_copy(table, n_pages * SPEC.page_nbytes(PAGE_SIZE), repeat)
        host = HostPool(SPEC, PAGE_SIZE, device.n_pages, LAYOUTS[layout])
        for label, kind in kinds:
            yield from _both_ways(table, label, kind(device, host, ThreadQueue()), n_pages, repeat)
        host.close()


def _plain_copy(table: str, nbytes: int, repeat: int) -> Row:
    source, target = (torch.frombuffer(map_memory(nbytes), dtype=torch.uint8) for _ in range(2))
    note = f"by {torch.get_num_threads()} threads"
    return _row(table, BASELINE, nbytes, lambda: target.copy_(source), repeat, note=note)


def _both_ways(
    table: str, label: str, transfer: Transfer, n_pages: int, repeat: int
) -> Iterator[Row]:
    layout = transfer.host_pool.layout.name
    shuffled = random.Random(0)
    pools = (transfer.device_pool, transfer.host_pool)
    device, host = (array("i", shuffled.sample(range(p.n_pages), n_pages)) for p in pools)
    nbytes = n_pages * SPEC.page_nbytes(PAGE_SIZE)
    target = TARGETS[layout] if "native" in label else ""
    ways: list[tuple[str, Callable[[], object]]] = [
        ("up", lambda: transfer.to_device(host, device).wait()),
        ("down", lambda: transfer.to_host(device, host).wait()),
    ]
    transfer.open()
    for way, call in ways:
        name = f"{way}, {label}"
        yield _row(table, name, nbytes, call, repeat, target=target)
    transfer.close()


def _row(
    table: str,
    name: str,
    nbytes: int,
    call: Callable[[], object],
    repeat: int,
    *,
    target: str = "",
    note: str = "",
) -> Row:
    call()
    wall, cpu = measure(call, repeat=repeat)
    return Row(
        table=table,
        name=name,
        unit="GB/s",
        samples=[nbytes / 1e9 / s for s in wall],
        cpu_samples=[nbytes / 1e9 / s for s in cpu],
        baseline=None if name == BASELINE else BASELINE,
        target=f"≥ {target} of copy_" if target else None,
        note=note,
    )
