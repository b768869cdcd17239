"""A trace of torch's profiler: loading layer by layer beside compute, and a store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.overlap import Compute
from benchmarks.gpu.place import Place, shuffled
from benchmarks.gpu.report import Check, Finding
from hicache_core.copies.open import IO_BACKENDS
from hicache_core.pools.device import DevicePool

FILE = "gpu-trace-{}.json.gz"


def run(place: Place) -> Iterator[Finding]:
    """Writes a trace for each io backend, to be opened in Perfetto or chrome://tracing."""
    n_pages = 2 if place.dry else 32
    device = DevicePool(place.spec, place.page_size, n_pages, place.device)
    host = place.host_pool(place.spec, place.page_size, n_pages, "layer_first")
    pages = shuffled(n_pages, n_pages)
    compute = Compute(place)
    kinds = [ProfilerActivity.CPU] + ([] if place.dry else [ProfilerActivity.CUDA])
    for io_backend in IO_BACKENDS:
        with place.transfer(io_backend, device, host) as transfer:
            transfer.to_device(pages, pages).wait()
            compute.all_layers()
            place.synchronize()
            profiler: Any = profile(activities=kinds)
            with profiler:
                with record_function("load beside compute"):
                    ticket = transfer.to_device(pages, pages)
                    for layer in range(place.spec.num_layers):
                        ticket.wait_layer(layer)
                        compute.layer()
                    ticket.wait()
                with record_function("store"):
                    transfer.to_host(pages, pages).wait()
                place.synchronize()
        file = place.out / FILE.format(io_backend)
        profiler.export_chrome_trace(str(file))
        names = {event.key for event in profiler.key_averages()}
        yield Check(f"a trace of {io_backend} is written", "store" in names, file.name)
    host.close()
