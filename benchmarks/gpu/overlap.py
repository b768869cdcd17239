"""Loading layer by layer beside compute: how much of the shorter of the two is hidden."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Iterator

import torch

from benchmarks.gpu.place import Place, shuffled
from benchmarks.gpu.report import Finding, Left
from benchmarks.harness import Row
from hicache_core.copies.base import Transfer
from hicache_core.pools.device import DevicePool

KINDS = (
    ("kernel", "page_first"),
    ("kernel", "page_first_direct"),
    ("kernel", "layer_first"),
    ("direct", "page_first_direct"),
    ("direct", "layer_first"),
)
TARGET = "≥ 80 %"
REPEAT = 5


class Compute:
    """Matrix products, as many in each layer as take about as long as the layer's load."""

    def __init__(self, place: Place) -> None:
        """Makes the matrices."""
        n = 32 if place.dry else 4096
        dtype = torch.float32 if place.dry else torch.bfloat16
        self._place = place
        self._a, self._b, self._c = (
            torch.zeros((n, n), dtype=dtype, device=place.device) for _ in range(3)
        )
        self._n_products = 1

    def fit(self, load_s: float) -> None:
        """Chooses how many products a layer has, so that all layers take about ``load_s``."""
        one_s = statistics.median(self._place.timed(self.all_layers, REPEAT))
        self._n_products = 1 if self._place.dry else max(1, round(load_s / one_s))

    def layer(self) -> None:
        """Launches the products of a layer."""
        for _ in range(self._n_products):
            torch.mm(self._a, self._b, out=self._c)

    def all_layers(self) -> None:
        """Launches the products of all layers."""
        for _ in range(self._place.spec.num_layers):
            self.layer()


def run(place: Place) -> Iterator[Finding]:
    """For each io backend and layout: load, compute, both, and how much of the shorter is hidden.

    0 %: together they take as long as one after the other; 100 %: as long as the longer alone.
    """
    n_pages = 2 if place.dry else 128
    device = DevicePool(place.spec, place.page_size, n_pages, place.device)
    pages = shuffled(n_pages, n_pages)
    for io_backend, layout in KINDS:
        host = place.host_pool(place.spec, place.page_size, n_pages, layout)
        with place.transfer(io_backend, device, host) as transfer:
            yield from _rows(place, f"{io_backend}, {layout}", transfer, pages)
        host.close()


def _rows(place: Place, name: str, transfer: Transfer, pages: array[int]) -> Iterator[Finding]:
    table = f"loading {len(pages) * place.page_size} tokens beside compute"
    compute = Compute(place)

    def load() -> None:
        transfer.to_device(pages, pages).wait()

    def both() -> None:
        ticket = transfer.to_device(pages, pages)
        for layer in range(place.spec.num_layers):
            ticket.wait_layer(layer)
            compute.layer()
        ticket.wait()

    compute.fit(statistics.median(place.timed(load, REPEAT)))
    seconds = {
        "load": place.timed(load, REPEAT),
        "compute": place.timed(compute.all_layers, REPEAT),
        "both": place.timed(both, REPEAT),
    }
    for what, samples in seconds.items():
        yield Row(table, f"{what}, {name}", "ms", [1e3 * each for each in samples])
    if place.dry:
        yield Left(f"how much is hidden, {name}", "times of a dry run say nothing")
        return
    alone = [statistics.median(seconds[what]) for what in ("load", "compute")]
    hidden = [100 * (sum(alone) - together) / min(alone) for together in seconds["both"]]
    yield Row(f"{table}, hidden", name, "%", hidden, target=TARGET)
