"""Picks the transfer for an io backend and a device, and opens it."""

from __future__ import annotations

from hicache_core.copies import native
from hicache_core.copies.base import CopyQueue, Transfer
from hicache_core.copies.direct import DirectTransfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.queues import ThreadQueue
from hicache_core.copies.streams import StreamQueue
from hicache_core.errors import SpecError
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool

IO_BACKENDS = ("direct", "kernel")


def open_transfer(
    io_backend: str,
    device_pool: DevicePool,
    host_pool: HostPool,
    queue: CopyQueue | None = None,
) -> Transfer:
    """Makes and opens a transfer; the caller closes it.

    ========  ==============================  ==================================  ===============
    backend   CPU                             CPU without the native module       CUDA
    ========  ==============================  ==================================  ===============
    direct    row copies (native)             ``copy_`` of each page and layer    the same, by DMA
    kernel    row copies (native)             gather and scatter of each layer    Triton
    ========  ==============================  ==================================  ===============

    Args:
        io_backend: ``direct`` or ``kernel``.
        device_pool: the device pool.
        host_pool: the host pool.
        queue: where copies run. Default: a copy thread on a CPU, and on CUDA a stream for each
            direction.

    Raises:
        SpecError: the io backend is unknown, the pools do not fit each other, or ``kernel`` on
            CUDA has a host pool that is not pinned, or no Triton that can compile.
    """
    if io_backend not in IO_BACKENDS:
        raise SpecError(
            f"unknown io backend {io_backend!r}; the io backends are: {', '.join(IO_BACKENDS)}"
        )
    if device_pool.device.type == "cpu":
        kind = native.NativeTransfer if native.IS_BUILT else _twin(io_backend)
        transfer = kind(device_pool, host_pool, queue or ThreadQueue())
    else:
        kind = DirectTransfer if io_backend == "direct" else _cuda_kernel(host_pool)
        loads = queue or StreamQueue(device_pool.device)
        stores = queue or StreamQueue(device_pool.device)
        transfer = kind(device_pool, host_pool, loads, stores)
    transfer.open()
    return transfer


def _twin(io_backend: str) -> type[Transfer]:
    return DirectTransfer if io_backend == "direct" else KernelTransfer


def _cuda_kernel(host_pool: HostPool) -> type[Transfer]:
    if not host_pool.pinned:
        raise SpecError(
            "io backend 'kernel' on CUDA needs pinned host memory: open the host pool with "
            "pin=True, or use io backend 'direct'"
        )
    try:
        # Triton comes with torch's CUDA builds only, so its import must not be anybody else's.
        from hicache_core.copies.triton_kernel import TritonTransfer
    except ModuleNotFoundError as error:
        raise SpecError(
            f"io backend 'kernel' on CUDA needs Triton: {error}; install triton, which comes with "
            "torch's CUDA builds, or use io backend 'direct'"
        ) from error

    return TritonTransfer
