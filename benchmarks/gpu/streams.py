"""Pinned memory, streams and events as CUDA has them: no emulation, but for a dry run's queues."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.gpu.place import Place, fill, shuffled
from benchmarks.gpu.report import Check, Finding, Left
from hicache_core.copies.base import Transfer
from hicache_core.copies.open import IO_BACKENDS
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool

BUSY_S = 0.05


def run(place: Place) -> Iterator[Finding]:
    """Checks each rule that copies on a GPU must keep."""
    yield from _pinned(place)
    n_pages = _n_pages(place)
    device = DevicePool(place.spec, place.page_size, n_pages, place.device)
    # Only where both sides are contiguous are plain copies asynchronous.
    host = place.host_pool(place.spec, place.page_size, n_pages, "layer_first")
    for io_backend in IO_BACKENDS:
        with place.transfer(io_backend, device, host) as transfer:
            yield _returns_at_once(place, io_backend, transfer)
            for rule in RULES:
                yield rule(place, io_backend, transfer)
    host.close()
    if place.dry or torch.cuda.device_count() == 1:
        yield Left("copies on a GPU that is not the current one", "there is one device only")
    else:
        yield from _on_another_gpu(place)


def _pinned(place: Place) -> Iterator[Finding]:
    if place.dry:
        yield Left("pinned memory", "a dry run pins none")
        return
    for _ in range(2):
        pool = place.host_pool(place.spec, place.page_size, _n_pages(place), "page_first")
        block = torch.frombuffer(pool.buffers[0], dtype=torch.uint8)
        yield Check("an open host pool is pinned", block.is_pinned(), f"{pool.nbytes >> 20} MiB")
        pool.close()
        yield Check("a closed host pool is not", not block.is_pinned())


def _returns_at_once(place: Place, io_backend: str, transfer: Transfer) -> Finding:
    """The owner thread goes on while compute that came before still runs."""
    rule = f"{io_backend}: starting a copy does not wait for compute"
    if place.dry:
        return Left(rule, "copies of a dry run wait for no compute")
    pages = _some(transfer)
    transfer.to_device(pages, pages).wait()
    place.busy(BUSY_S)
    began = time.perf_counter()
    ticket = transfer.to_device(pages, pages)
    took_s = time.perf_counter() - began
    was_done = ticket.done()
    well = ticket.wait() and ticket.error is None
    return Check(rule, well and not was_done, f"returned after {took_s * 1e3:.2f} ms")


def _stores_what_was_computed(place: Place, io_backend: str, transfer: Transfer) -> Check:
    """A store sees what compute wrote last before it, and the host sees it once it is done."""
    pages = _some(transfer)
    place.busy(BUSY_S)
    for at, buffer in enumerate(_flat(transfer.device_pool)):
        fill(buffer, at + 7)
    ticket = transfer.to_host(pages, pages)
    while not ticket.done():  # no synchronize: the event is all that the owner asks
        time.sleep(0.0005)
    return Check(f"{io_backend}: a store has what was computed before it", _agree(transfer, pages))


def _waits_for_layers(place: Place, io_backend: str, transfer: Transfer) -> Check:
    """What is computed behind ``wait_layer`` sees the rows of that layer."""
    pages = _some(transfer)
    fill(torch.frombuffer(transfer.host_pool.buffers[0], dtype=torch.uint8), 3)
    index = torch.tensor(list(pages))
    on_device = index.to(transfer.device_pool.device)  # now: it would wait for the stream below
    place.synchronize()
    place.busy(BUSY_S)
    ticket = transfer.to_device(pages, pages)
    seen = []
    for layer in range(place.spec.num_layers):
        ticket.wait_layer(layer)
        for part, at in place.spec.components_in(layer):
            buffer = transfer.device_pool.buffers[part][at]
            seen.append((part, at, buffer[on_device]))
    ticket.wait()
    place.synchronize()
    same = all(
        torch.equal(
            rows.cpu().flatten(2).view(torch.uint8), transfer.host_pool.rows(part)[index, at]
        )
        for part, at, rows in seen
    )
    return Check(f"{io_backend}: compute behind wait_layer sees the layer", same)


def _dropped(place: Place, io_backend: str, transfer: Transfer) -> Check:
    """Tickets that nobody keeps still copy the pages that they named, not later ones."""
    for at, buffer in enumerate(_flat(transfer.device_pool)):
        fill(buffer, at + 11)
    place.busy(BUSY_S)
    n_pages = transfer.device_pool.n_pages
    for page in range(n_pages - 1):
        transfer.to_host(array("i", [page]), array("i", [page]))
    last = array("i", [n_pages - 1])
    transfer.to_host(last, last).wait()
    return Check(
        f"{io_backend}: copies whose tickets are dropped are right",
        _agree(transfer, array("i", range(n_pages))),
    )


def _on_another_stream(place: Place, io_backend: str, transfer: Transfer) -> Check:
    """An engine may compute on a stream of its own."""
    cuda: Any = torch.cuda
    pages = _some(transfer)
    with nullcontext() if place.dry else cuda.stream(cuda.Stream()):
        place.busy(BUSY_S)
        for at, buffer in enumerate(_flat(transfer.device_pool)):
            fill(buffer, at + 23)
        ticket = transfer.to_host(pages, pages)
    ticket.wait()
    return Check(f"{io_backend}: copies follow the current stream", _agree(transfer, pages))


def _on_another_gpu(place: Place) -> Iterator[Finding]:
    """All of it again on the second GPU, while the first is the current one."""
    device = DevicePool(place.spec, place.page_size, _n_pages(place), "cuda:1")
    host = place.host_pool(place.spec, place.page_size, _n_pages(place), "layer_first")
    for io_backend in IO_BACKENDS:
        with place.transfer(io_backend, device, host) as transfer:
            for rule in (_stores_what_was_computed, _dropped):
                found = rule(place, io_backend, transfer)
                yield Check(f"{found.rule}, on a GPU that is not the current one", found.held)
    host.close()


def _n_pages(place: Place) -> int:
    return 6 if place.dry else 32


def _some(transfer: Transfer) -> array[int]:
    n_pages = transfer.device_pool.n_pages
    return shuffled(n_pages, max(1, n_pages // 4))


def _flat(device: DevicePool) -> list[torch.Tensor]:
    return [buffer for layers in device.buffers for buffer in layers]


def _agree(transfer: Transfer, pages: array[int]) -> bool:
    """Whether pages hold the same on both sides, each at the same id."""
    index, host = torch.tensor(list(pages)), transfer.host_pool
    return all(
        torch.equal(
            buffer.cpu().flatten(2).view(torch.uint8)[index], _host_rows(host, part, at)[index]
        )
        for part, layers in enumerate(transfer.device_pool.buffers)
        for at, buffer in enumerate(layers)
    )


def _host_rows(host: HostPool, part: int, at: int) -> torch.Tensor:
    return host.rows(part)[:, at]


RULES: tuple[Callable[[Place, str, Transfer], Check], ...] = (
    _stores_what_was_computed,
    _waits_for_layers,
    _dropped,
    _on_another_stream,
)
"""What must hold of both io backends."""
