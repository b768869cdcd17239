"""Picks the transfer for an io backend and a device, and opens it."""

from __future__ import annotations

from hicache_core.errors import SpecError
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.transfer import native
from hicache_core.transfer.base import CopyQueue, Transfer
from hicache_core.transfer.direct import DirectTransfer
from hicache_core.transfer.kernel import KernelTransfer
from hicache_core.transfer.queues import ThreadQueue

IO_BACKENDS: dict[str, type[Transfer]] = {"direct": DirectTransfer, "kernel": KernelTransfer}


def open_transfer(
    io_backend: str,
    device_pool: DevicePool,
    host_pool: HostPool,
    queue: CopyQueue | None = None,
) -> Transfer:
    """An open transfer; the caller closes it.

    Args:
        io_backend: ``direct`` or ``kernel``.
        device_pool: one end.
        host_pool: the other end.
        queue: where copies run; a copy thread of its own by default.

    Raises:
        SpecError: there is no such io backend, or the pools do not fit each other.
    """
    if io_backend not in IO_BACKENDS:
        raise SpecError(f"no io backend {io_backend!r}; there are: {', '.join(IO_BACKENDS)}")
    kind = IO_BACKENDS[io_backend]
    if native.IS_BUILT and device_pool.device.type == "cpu":
        kind = native.NativeTransfer
    transfer = kind(device_pool, host_pool, queue or ThreadQueue())
    transfer.open()
    return transfer
