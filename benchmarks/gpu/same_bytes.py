"""Copies between device and host, byte for byte, for each dtype, layout, direction and io backend.

What is expected is computed by indexing, on the CPU, without any code of ``hicache_core.copies``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import torch

from benchmarks.gpu.place import Place, fill, shuffled
from benchmarks.gpu.report import Check, Finding, Left
from hicache_core.copies.base import Direction, Transfer
from hicache_core.copies.open import IO_BACKENDS
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
FAR_NBYTES = 5 << 30
"""A pool larger than what 32 bits can address."""


def specs(place: Place) -> dict[str, KVSpec]:
    """Every dtype, and rows of several kinds and odd sizes; short ones in a dry run."""
    state, head_dim, rank = ((5, 9), 4, 6) if place.dry else ((91, 151), 64, 512)

    def heads(dtype: str, head_dim: int = head_dim) -> KVSpec:
        return KVSpec.mha(
            num_layers=2, num_heads=2, head_dim=head_dim, dtype=dtype, fingerprint="f"
        )

    latent = KVSpec.mla(
        num_layers=2, kv_lora_rank=rank, rope_dim=rank // 2, dtype="bfloat16", fingerprint="f"
    )
    scales = KVSpec.mha(
        num_layers=2,
        num_heads=3,
        head_dim=10,
        dtype="float8_e4m3fn",
        fingerprint="f",
        scale_dtype="float32",
        v_head_dim=5,
    )
    parts = (
        Component("recurrent_0", state, "float32", (0,)),
        Component("conv_0", (5, 3), "float32"),
        Component("indexer_k", (7,), "int8", (1,)),
    )
    return {
        **{dtype: heads(dtype) for dtype in DTYPES},
        "odd heads, bfloat16": heads("bfloat16", 7),
        "odd heads, int8": heads("int8", 3),
        "latent": latent,
        "fp8 with scales": scales,
        "a state, and layers that differ": KVSpec(parts, 2, "f", (0, 2), (0, 1, 1)),
    }


def run(place: Place) -> Iterator[Finding]:
    """A check for each spec and io backend, over all layouts and both directions."""
    for name, spec in specs(place).items():
        for io_backend in IO_BACKENDS:
            wrong = [
                f"{layout} {direction.value}"
                for layout in LAYOUTS
                for direction in Direction
                if not _is_same(place, spec, io_backend, layout, direction)
            ]
            n_tried = len(LAYOUTS) * len(Direction)
            note = f"wrong: {', '.join(wrong)}" if wrong else f"{n_tried} copies compared"
            yield Check(f"{io_backend} moves the bytes of {name}", not wrong, note)
    yield from _far(place)


def _is_same(
    place: Place, spec: KVSpec, io_backend: str, layout: str, direction: Direction
) -> bool:
    page_size, n_pages = (2, 2) if place.dry else (16, 5)
    device = DevicePool(spec, page_size, 9, place.device)
    host = place.host_pool(spec, page_size, 7, layout)
    for at, buffer in enumerate(_flat(device)):
        fill(buffer, at)
    fill(torch.frombuffer(host.buffers[0], dtype=torch.uint8), 99)
    pages = shuffled(9, n_pages), shuffled(7, n_pages)
    expected = _expected(device, host, pages, direction)
    place.synchronize()
    with place.transfer(io_backend, device, host) as transfer:
        ended_well = _copy(transfer, pages, direction)
        found = _rows(device), [host.rows(c).clone() for c in range(len(spec.components))]
    host.close()
    same = all(
        torch.equal(a, b)
        for side, its in zip(expected, found, strict=True)
        for a, b in zip(side, its, strict=True)
    )
    return ended_well and same


def _copy(transfer: Transfer, pages: tuple[array[int], array[int]], direction: Direction) -> bool:
    on_device, on_host = pages
    if direction is Direction.TO_HOST:
        ticket = transfer.to_host(on_device, on_host)
    else:
        ticket = transfer.to_device(on_host, on_device)
    return ticket.wait() and ticket.error is None


def _flat(device: DevicePool) -> list[torch.Tensor]:
    return [buffer for layers in device.buffers for buffer in layers]


def _rows(device: DevicePool) -> list[torch.Tensor]:
    """All rows of a component as bytes on the CPU: (n_pages, n_layers, page_size, row_nbytes)."""
    return [
        torch.stack([layer.cpu().flatten(2).view(torch.uint8) for layer in layers], dim=1)
        for layers in device.buffers
    ]


def _expected(
    device: DevicePool,
    host: HostPool,
    pages: tuple[array[int], array[int]],
    direction: Direction,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What both sides hold afterwards."""
    on_device, on_host = (list(ids) for ids in pages)
    rows = _rows(device), [host.rows(c).clone() for c in range(len(host.spec.components))]
    for its, kept in zip(*rows, strict=True):
        if direction is Direction.TO_HOST:
            kept[on_host] = its[on_device]
        else:
            its[on_device] = kept[on_host]
    return rows


def _far(place: Place) -> Iterator[Finding]:
    """The last pages of pools that are larger than 4 GiB."""
    if place.dry:
        yield Left("pages beyond 4 GiB", "a dry run has no such pools")
        return
    n_pages = FAR_NBYTES // place.spec.page_nbytes(place.page_size)
    device = DevicePool(place.spec, place.page_size, n_pages, place.device)
    ends = array("i", [n_pages - 1, 0, n_pages // 2])
    back = array("i", [1, 2, n_pages - 2])
    for layout in LAYOUTS:
        host = place.host_pool(place.spec, place.page_size, n_pages, layout)
        for io_backend in IO_BACKENDS:
            for buffer in _flat(device):
                buffer[list(ends)] = torch.randn(
                    (3, *buffer.shape[1:]), dtype=buffer.dtype, device=buffer.device
                )
            with place.transfer(io_backend, device, host) as transfer:
                well = _copy(transfer, (ends, ends), Direction.TO_HOST)
                well = well and _copy(transfer, (back, ends), Direction.TO_DEVICE)
            same = all(torch.equal(b[list(ends)], b[list(back)]) for b in _flat(device))
            yield Check(
                f"{io_backend} moves pages beyond 4 GiB, {layout}",
                well and same,
                f"pools of {host.nbytes / 1e9:.1f} GB",
            )
        host.close()
