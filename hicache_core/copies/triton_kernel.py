"""The io backend ``kernel`` on CUDA: one Triton launch reads and writes pinned host rows directly.

Checked in Triton's interpreter against the copies on a CPU; not yet measured on a GPU. Imports
Triton, so only the CUDA path imports this module.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import Any

import torch
import triton
import triton.language as tl

from hicache_core.copies.base import CopyLayers, CopyQueue, Direction, PageIds, Transfer
from hicache_core.copies.rows import row_words
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool

PLAN_FIELDS = 7
"""Device base, page stride, token stride; host base, page stride, token stride; words."""

BLOCK_WORDS = 256

PLAN_WORDS = 32 * BLOCK_WORDS
"""Words of a plan. A longer row, such as a snapshot's, has several, so that programs share it."""


# One program copies one token's row of one page by one plan. Strides and bases are in bytes.
def _copy_rows(
    plans: tl.tensor,
    device_pages: tl.tensor,
    host_pages: tl.tensor,
    TO_HOST: tl.constexpr,  # noqa: N803 - Triton's convention for compile-time constants
    WORD: tl.constexpr,  # noqa: N803
    FIELDS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    pair = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    plan = plans + tl.program_id(2) * FIELDS
    device_page = tl.load(device_pages + pair).to(tl.int64)
    host_page = tl.load(host_pages + pair).to(tl.int64)
    device = tl.load(plan) + device_page * tl.load(plan + 1) + token * tl.load(plan + 2)
    host = tl.load(plan + 3) + host_page * tl.load(plan + 4) + token * tl.load(plan + 5)
    n_words = tl.load(plan + 6)
    device_row = device.to(tl.pointer_type(WORD))
    host_row = host.to(tl.pointer_type(WORD))
    for start in range(0, n_words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_words
        if TO_HOST:
            tl.store(host_row + at, tl.load(device_row + at, mask=inside), mask=inside)
        else:
            tl.store(device_row + at, tl.load(host_row + at, mask=inside), mask=inside)


copy_rows: Any = triton.jit(_copy_rows)

WORDS = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.uint8: tl.uint8}


class TritonTransfer(Transfer):
    """One launch for each layer to the device, and one launch for all layers to the host.

    The host pool must be pinned, since the kernel reads and writes it by address.
    """

    def __init__(
        self,
        device_pool: DevicePool,
        host_pool: HostPool,
        queue: CopyQueue,
        store_queue: CopyQueue | None = None,
    ) -> None:
        """Computes the addresses of all rows once and keeps them on the device.

        Args:
            device_pool: the device pool, on a CUDA device.
            host_pool: the host pool of the same spec and page size, in pinned memory.
            queue: where copies run.
            store_queue: where copies to the host run, if not in ``queue``.

        Raises:
            SpecError: the pools do not fit each other.
        """
        super().__init__(device_pool, host_pool, queue, store_queue)
        # Plans hold bare addresses: these views keep the memory behind them.
        self._rows = rows = row_words(device_pool, host_pool)
        words = {on_host.dtype for layer in rows for _, on_host in layer}
        self._word = min(words, key=lambda word: word.itemsize, default=torch.int64)
        by_layer = [
            [plan for pair in layer for plan in _plans(*pair, self._word.itemsize)]
            for layer in rows
        ]
        plans = list(chain.from_iterable(by_layer))
        self._starts = list(accumulate(map(len, by_layer), initial=0))  # of each layer
        table = torch.tensor(plans, dtype=torch.int64, device=device_pool.device)
        self._plans = table.view(len(plans), PLAN_FIELDS)

    def _prepare(
        self, direction: Direction, device_pages: PageIds, host_pages: PageIds
    ) -> CopyLayers:
        device_ids, host_ids = self._upload(device_pages), self._upload(host_pages)

        def copy(layers: range) -> None:
            plans = self._plans[self._starts[layers.start] : self._starts[layers.stop]]
            grid = (len(device_ids), self.device_pool.page_size, len(plans))
            if len(device_ids) > 0 and len(plans) > 0:
                copy_rows[grid](
                    plans,
                    device_ids,
                    host_ids,
                    TO_HOST=direction is Direction.TO_HOST,
                    WORD=WORDS[self._word],
                    FIELDS=PLAN_FIELDS,
                    BLOCK=BLOCK_WORDS,
                )

        return copy

    def _upload(self, pages: PageIds) -> torch.Tensor:
        """Page ids on the device, int32 (n_pages,)."""
        return torch.tensor(array("i", pages), dtype=torch.int32, device=self.device_pool.device)


def _plans(on_device: torch.Tensor, on_host: torch.Tensor, word_nbytes: int) -> Iterator[list[int]]:
    """Plans for the rows (n_pages, page_size, n_words) of one component and layer, in pieces."""
    n_words = on_device.shape[-1] * on_device.itemsize // word_nbytes
    for start in range(0, n_words, PLAN_WORDS):
        plan: list[int] = []
        for rows in (on_device, on_host):
            page, token, _ = (stride * rows.itemsize for stride in rows.stride())
            plan += [rows.data_ptr() + start * word_nbytes, page, token]
        yield [*plan, min(PLAN_WORDS, n_words - start)]
