"""Both io backends on a CPU, by the native module: row copies without Python's lock."""

from __future__ import annotations

import os
import struct
from array import array
from itertools import accumulate

import torch

from hicache_core.copies.base import CopyLayers, CopyQueue, Direction, PageIds, Transfer
from hicache_core.copies.rows import row_bytes
from hicache_core.errors import SpecError
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool

try:
    if os.environ.get("HICACHE_PURE_PYTHON") == "1":
        raise ImportError("HICACHE_PURE_PYTHON asks for the twin")
    from hicache_core.copies import _transfer
except ImportError:
    IS_BUILT = False
else:
    IS_BUILT = True

PLAN = struct.Struct("=8q")  # as plan_t in _transfer.c
"""Device base, page stride, token stride; host base, page stride, token stride; row, tokens."""


class NativeTransfer(Transfer):
    """Copies each row from its address in one pool to its address in the other.

    Copies of 4 MiB and more bypass the CPU's cache and write four rows at a time. The code is the
    same for every host layout, so ``direct`` and ``kernel`` do not differ here.
    """

    def __init__(
        self,
        device_pool: DevicePool,
        host_pool: HostPool,
        queue: CopyQueue,
        store_queue: CopyQueue | None = None,
    ) -> None:
        """Computes the addresses of all rows once.

        Args:
            device_pool: the device pool, on the CPU.
            host_pool: the host pool of the same spec and page size.
            queue: where copies run.
            store_queue: where copies to the host run, if not in ``queue``.

        Raises:
            SpecError: the pools do not fit each other or are not on a CPU, or the native module
                was not built.
        """
        super().__init__(device_pool, host_pool, queue, store_queue)
        if not IS_BUILT or device_pool.device.type != "cpu":
            raise SpecError(
                f"NativeTransfer needs hicache_core.copies._transfer (built: {IS_BUILT}) "
                f"and a device pool on the CPU (it is on {device_pool.device})"
            )
        # Plans hold bare addresses: these views keep the memory behind them.
        self._rows = row_bytes(device_pool, host_pool)
        plans = [b"".join(_plan(*pair) for pair in layer) for layer in self._rows]
        self._plans = b"".join(plans)
        self._starts = list(accumulate(map(len, plans), initial=0))  # of each layer, in bytes

    def _prepare(
        self, direction: Direction, device_pages: PageIds, host_pages: PageIds
    ) -> CopyLayers:
        device_ids, host_ids = array("i", device_pages), array("i", host_pages)
        n_device, n_host = self.device_pool.n_pages, self.host_pool.n_pages
        plans, starts = memoryview(self._plans), self._starts
        to_host = direction is Direction.TO_HOST

        def copy(layers: range) -> None:
            part = plans[starts[layers.start] : starts[layers.stop]]
            _transfer.copy_rows(part, device_ids, n_device, host_ids, n_host, to_host)

        return copy


def _plan(on_device: torch.Tensor, on_host: torch.Tensor) -> bytes:
    """Where the rows (n_pages, page_size, row_nbytes) of one component and layer lie."""
    _, n_tokens, row_nbytes = on_device.shape
    device_page, device_token, _ = on_device.stride()
    host_page, host_token, _ = on_host.stride()
    if device_token == host_token == row_nbytes:  # the tokens of a page are one run on both sides
        row_nbytes, n_tokens = row_nbytes * n_tokens, 1
    return PLAN.pack(
        on_device.data_ptr(),
        device_page,
        device_token,
        on_host.data_ptr(),
        host_page,
        host_token,
        row_nbytes,
        n_tokens,
    )
