"""Where parts run: a GPU, or the CPU of a dry run; with the pools and copies that belong there."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.plan import NOT_MEASURED
from hicache_core.copies import native
from hicache_core.copies.base import Transfer
from hicache_core.copies.direct import DirectTransfer
from hicache_core.copies.open import open_transfer
from hicache_core.copies.queues import ThreadQueue
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS

LLAMA_3_8B = KVSpec.mha(
    num_layers=32, num_heads=8, head_dim=128, dtype="bfloat16", fingerprint="benchmark"
)
SMALL = KVSpec.mha(num_layers=2, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="benchmark")


class NoGpu(Exception):
    """torch sees no GPU."""


@dataclass(frozen=True)
class Place:
    """A GPU, or the CPU of a dry run.

    Attributes:
        dry: whether it is the CPU: sizes are shrunk, Triton is interpreted, and times say nothing.
        out: a folder for files of the report.
    """

    dry: bool
    out: Path

    @property
    def device(self) -> torch.device:
        """Where device pages are."""
        return (
            torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())
        )

    @property
    def spec(self) -> KVSpec:
        """The KV of Llama 3 8B; of a tiny model in a dry run."""
        return SMALL if self.dry else LLAMA_3_8B

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return 2 if self.dry else 64

    def host_pool(self, spec: KVSpec, page_size: int, n_pages: int, layout: str) -> HostPool:
        """A host pool, pinned on a GPU machine.

        Args:
            spec: what a token's row is.
            page_size: tokens of a page.
            n_pages: pages.
            layout: its name.
        """
        return HostPool(spec, page_size, n_pages, LAYOUTS[layout], pin=not self.dry)

    @contextmanager
    def transfer(self, io_backend: str, device: DevicePool, host: HostPool) -> Iterator[Transfer]:
        """An open transfer: what a server has on a GPU, and its CUDA code as far as a CPU can run
        it in a dry run.

        Args:
            io_backend: ``kernel`` or ``direct``.
            device: the device pool.
            host: the host pool.
        """
        transfer = self._dry(io_backend, device, host) if self.dry else None
        transfer = transfer or open_transfer(io_backend, device, host)
        try:
            yield transfer
        finally:
            transfer.close()

    def _dry(self, io_backend: str, device: DevicePool, host: HostPool) -> Transfer:
        transfer: Transfer
        if io_backend == "direct":
            transfer = DirectTransfer(device, host, ThreadQueue())
        else:
            from hicache_core.copies.triton_kernel import TritonTransfer

            transfer = TritonTransfer(device, host, ThreadQueue())
        transfer.open()
        return transfer

    def synchronize(self) -> None:
        """Waits for all that was launched on the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object], repeat: int) -> list[float]:
        """Seconds of calls, until the device has ended what they launched; one more warms up.

        Args:
            call: what is measured.
            repeat: samples; one in a dry run.
        """
        seconds = []
        for at in range((1 if self.dry else repeat) + 1):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            if at:
                seconds.append(time.perf_counter() - began)
        return seconds

    def busy(self, seconds: float) -> None:
        """Keeps the current stream busy; does nothing in a dry run."""
        if not self.dry:
            clock_hz = 1.5e9  # near enough: how long exactly does not matter
            sleep: Any = torch.cuda._sleep
            sleep(int(seconds * clock_hz))


def shuffled(n_pages: int, n: int) -> array[int]:
    """``n`` of ``n_pages`` page ids, in an order that is the same in every run."""
    return array("i", random.Random(n_pages).sample(range(n_pages), n))


def fill(tensor: torch.Tensor, seed: int) -> None:
    """Random bytes, the same for a seed, whatever the dtype.

    Args:
        tensor: contiguous, on any device.
        seed: of the bytes.
    """
    generator = torch.Generator(tensor.device).manual_seed(seed)
    tensor.view(-1).view(torch.uint8).random_(0, 256, generator=generator)


def device_facts(*, dry: bool) -> dict[str, str]:
    """What the run is on.

    Raises:
        NoGpu: there is none, and ``dry`` is not set.
    """
    versions = {
        "torch": str(torch.__version__),
        "triton": _triton(),
        "native modules": "built" if native.IS_BUILT else "not built, their twins in Python ran",
    }
    if dry:
        return {"device": NOT_MEASURED, **versions}
    if not torch.cuda.is_available():
        raise NoGpu(
            f"torch {torch.__version__} sees no GPU: see --what-to-bring if it is a build for the "
            "CPU, or try --dry-run"
        )
    properties: Any = torch.cuda.get_device_properties(0)
    return {
        "device": f"measured on {properties.name}, {properties.total_memory >> 30} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda),
        **versions,
    }


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
