"""Copies in GB/s, against one copy between pinned memory and the device of the same bytes."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.place import Place, shuffled
from benchmarks.gpu.report import Finding, Left
from benchmarks.harness import Row
from hicache_core.copies.base import Ticket, Transfer
from hicache_core.pools.device import DevicePool
from hicache_core.pools.layout import LAYOUTS

TARGETS = {"kernel": "≥ 85 % of one copy", "direct": "≥ 70 % of one copy"}
REPEAT = 7
PROGRAMS = (1, 4, 16)
"""Programs for each multiprocessor that the kernel is tried with, besides its own choice."""


def run(place: Place) -> Iterator[Finding]:
    """Each layout, io backend and direction; then the kernel with other numbers of programs."""
    n_pages = 2 if place.dry else 64
    device = DevicePool(place.spec, place.page_size, n_pages + n_pages // 2, place.device)
    nbytes = n_pages * place.spec.page_nbytes(place.page_size)
    table = f"{n_pages} pages of {place.spec.page_nbytes(place.page_size) / 2**20:.3g} MiB"
    yield from _one_copy(place, table, nbytes)
    for layout in LAYOUTS:
        host = place.host_pool(place.spec, place.page_size, device.n_pages, layout)
        pages = shuffled(device.n_pages, n_pages)
        for io_backend, target in TARGETS.items():
            with place.transfer(io_backend, device, host) as transfer:
                name = f"{io_backend}, {layout}"
                yield from _both_ways(place, (table, name, target), transfer, pages, nbytes)
        host.close()
    yield from _other_programs(place, table, device, n_pages)


def _one_copy(place: Place, table: str, nbytes: int) -> Iterator[Row]:
    on_host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=not place.dry)
    on_device = torch.zeros(nbytes, dtype=torch.uint8, device=place.device)
    for way, target, source in (("up", on_device, on_host), ("down", on_host, on_device)):

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=True)

        yield _row(place, table, f"{way}, one copy", nbytes, copy)


def _both_ways(
    place: Place,
    titles: tuple[str, str, str],
    transfer: Transfer,
    pages: array[int],
    nbytes: int,
) -> Iterator[Row]:
    """How fast, and for how long the owner thread is busy with it."""
    table, name, target = titles
    ways: list[tuple[str, Callable[[array[int], array[int]], Ticket]]] = [
        ("up", transfer.to_device),
        ("down", transfer.to_host),
    ]
    for way, start in ways:

        def copy(start: Callable[[array[int], array[int]], Ticket] = start) -> None:
            start(pages, pages).wait()

        yield _row(place, table, f"{way}, {name}", nbytes, copy, target)
        yield _starting(place, f"{way}, {name}", lambda start=start: start(pages, pages))  # type: ignore[misc]


def _row(
    place: Place,
    table: str,
    name: str,
    nbytes: int,
    call: Callable[[], object],
    target: str | None = None,
) -> Row:
    samples = [nbytes / 1e9 / seconds for seconds in place.timed(call, REPEAT)]
    baseline = None if target is None else f"{name.partition(',')[0]}, one copy"
    return Row(table, name, "GB/s", samples, baseline=baseline, target=target)


def _starting(place: Place, name: str, start: Callable[[], Ticket]) -> Row:
    """Milliseconds until the call returns; the copy itself is not measured."""
    samples = []
    for _ in range(1 if place.dry else REPEAT):
        place.synchronize()
        began = time.perf_counter()
        ticket = start()
        samples.append(1e3 * (time.perf_counter() - began))
        ticket.wait()
    return Row("starting a copy, on the owner thread", name, "ms", samples)


def _other_programs(
    place: Place, table: str, device: DevicePool, n_pages: int
) -> Iterator[Finding]:
    if place.dry:
        yield Left(
            "the kernel with other numbers of programs", "Triton's interpreter runs them in line"
        )
        return
    from hicache_core.copies import triton_kernel

    pages, own = shuffled(device.n_pages, n_pages), triton_kernel.PROGRAMS_EACH
    nbytes = n_pages * place.spec.page_nbytes(place.page_size)
    host = place.host_pool(place.spec, place.page_size, device.n_pages, "page_first")
    for each in PROGRAMS:
        triton_kernel.PROGRAMS_EACH = each
        with place.transfer("kernel", device, host) as transfer:
            titles = table, f"kernel, page_first, {each} a multiprocessor (of its own: {own})", "–"
            yield from _both_ways(place, titles, transfer, pages, nbytes)
    triton_kernel.PROGRAMS_EACH = own
    host.close()
