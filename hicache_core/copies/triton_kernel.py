"""The io backend ``kernel`` on CUDA: one Triton launch reads and writes pinned host rows directly.

Checked in Triton's interpreter against the copies on a CPU; not yet measured on a GPU. Imports
Triton, so only the CUDA path imports this module.
"""

from __future__ import annotations

import subprocess
from array import array
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import Any, cast

import torch
import triton
import triton.language as tl

from hicache_core.copies.base import CopyLayers, CopyQueue, Direction, PageIds, Transfer
from hicache_core.copies.rows import row_words
from hicache_core.errors import SpecError
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool

PLAN_FIELDS = 7
"""Device base, page stride, token stride; host base, page stride, token stride; words."""

BLOCK_WORDS = 256

PLAN_WORDS = 32 * BLOCK_WORDS
"""Words of a plan. A longer row, such as a snapshot's, has several, so that programs share it."""

PROGRAMS_EACH = 2
"""Programs for each multiprocessor of the GPU: enough reads under way for the bus, by its latency.
With a program for each row, a copy would hold every multiprocessor until its last bytes have come
over the bus, and compute beside it would wait."""

PROGRAMS_INTERPRETED = 3


# Each program copies every n-th row: one token's row of one page by one plan. The tokens of a page
# are neighbours, then its plans. Strides and bases are in bytes, and 64 bits wide like all
# positions, since a pool may have more than 2^31 bytes and a copy more than 2^31 rows.
def _copy_rows(  # noqa: PLR0913, PLR0917 - a kernel has no objects to put them into
    plans: tl.tensor,
    device_pages: tl.tensor,
    host_pages: tl.tensor,
    n_pairs: tl.tensor,
    n_plans: tl.tensor,
    TO_HOST: tl.constexpr,  # noqa: N803 - Triton's convention for compile-time constants
    TOKENS: tl.constexpr,  # noqa: N803
    WORD: tl.constexpr,  # noqa: N803
    FIELDS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    first = tl.program_id(0).to(tl.int64)
    n_rows = n_pairs.to(tl.int64) * n_plans * TOKENS
    for row in range(first, n_rows, tl.num_programs(0).to(tl.int64)):
        token = row % TOKENS
        plan = plans + row // TOKENS % n_plans * FIELDS
        pair = row // TOKENS // n_plans
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


# Triton would compile one more kernel for each alignment and for counts that divide by 16: while
# requests wait, since only then these are known.
UNSPECIALIZED = ("plans", "device_pages", "host_pages", "n_pairs", "n_plans")

copy_rows: Any = triton.jit(_copy_rows, do_not_specialize=UNSPECIALIZED)

WORDS = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.uint8: tl.uint8}

COMPILE_ERRORS = (
    triton.TritonError,
    RuntimeError,
    OSError,
    ImportError,
    subprocess.SubprocessError,
)
"""Of Triton itself, and of the C compiler that it calls."""


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
        """Computes the addresses of all rows once, keeps them on the device, and compiles.

        Args:
            device_pool: the device pool, on a CUDA device.
            host_pool: the host pool of the same spec and page size, in pinned memory.
            queue: where copies run.
            store_queue: where copies to the host run, if not in ``queue``.

        Raises:
            SpecError: the pools do not fit each other, or the kernel cannot be compiled here.
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
        device = device_pool.device
        table = torch.tensor(plans, dtype=torch.int64, device=device)
        self._plans = table.view(len(plans), PLAN_FIELDS)
        self._n_programs = _n_programs(device)
        self._compile()

    def _prepare(
        self, direction: Direction, device_pages: PageIds, host_pages: PageIds
    ) -> CopyLayers:
        n_pages = len(device_pages)
        both = self._upload(device_pages + host_pages)
        device_ids, host_ids = both[:n_pages], both[n_pages:]

        def copy(layers: range) -> None:
            plans = self._plans[self._starts[layers.start] : self._starts[layers.stop]]
            if n_pages > 0 and len(plans) > 0:
                self._launch(direction, plans, device_ids, host_ids)

        return copy

    def _launch(
        self,
        direction: Direction,
        plans: torch.Tensor,
        device_ids: torch.Tensor,
        host_ids: torch.Tensor,
    ) -> None:
        tokens = self.device_pool.page_size
        n_programs = max(1, min(self._n_programs, len(device_ids) * len(plans) * tokens))
        copy_rows[(n_programs,)](
            plans,
            device_ids,
            host_ids,
            len(device_ids),
            len(plans),
            TO_HOST=direction is Direction.TO_HOST,
            TOKENS=tokens,
            WORD=WORDS[self._word],
            FIELDS=PLAN_FIELDS,
            BLOCK=BLOCK_WORDS,
        )

    def _compile(self) -> None:
        """Launches the kernel for no page, both ways, so that no request waits for its compiler."""
        nothing, cuda = self._upload(array("i")), cast("Any", torch.cuda)
        try:
            with cuda.device_of(self._plans):  # Triton launches on the current device
                for direction in Direction:
                    self._launch(direction, self._plans, nothing, nothing)
        except COMPILE_ERRORS as error:
            raise SpecError(
                f"io backend 'kernel' cannot be compiled here: {error}; Triton needs a C compiler "
                "and Python's headers (on Debian: gcc and python3-dev), or use io backend 'direct'"
            ) from error

    def _upload(self, pages: PageIds) -> torch.Tensor:
        """Page ids on the device, int32 (n,).

        They come from pinned memory: a copy from any other would first wait for all that compute
        has queued, and the owner thread with it.
        """
        device = self.device_pool.device
        ids = torch.tensor(array("i", pages), dtype=torch.int32, pin_memory=device.type == "cuda")
        return ids.to(device, non_blocking=True)


def _n_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED  # Triton's interpreter runs them one after the other
    properties: Any = torch.cuda.get_device_properties(device)
    return PROGRAMS_EACH * int(properties.multi_processor_count)


def _plans(on_device: torch.Tensor, on_host: torch.Tensor, word_nbytes: int) -> Iterator[list[int]]:
    """Plans for the rows (n_pages, page_size, n_words) of one component and layer, in pieces."""
    n_words = on_device.shape[-1] * on_device.itemsize // word_nbytes
    for start in range(0, n_words, PLAN_WORDS):
        plan: list[int] = []
        for rows in (on_device, on_host):
            page, token, _ = (stride * rows.itemsize for stride in rows.stride())
            plan += [rows.data_ptr() + start * word_nbytes, page, token]
        yield [*plan, min(PLAN_WORDS, n_words - start)]
