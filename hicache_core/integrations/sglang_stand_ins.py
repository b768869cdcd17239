"""Stand-ins for the objects that SGLang passes to a class for its ``dynamic``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hicache_core.errors import BackendTimeout

_SLOT_WAIT_S = 30.0


@dataclass
class StorageConfig:
    """What SGLang passes as ``storage_config``; the same attributes, one rank.

    One rank and ``is_mla_model`` say to a class: one object a page, whole, written by you. Which
    shard of the model the page holds is part of our keys already.
    """

    extra_config: dict[str, object]
    model_name: str
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = True
    enable_storage_metrics: bool = False
    is_page_first_layout: bool = True
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    dp_rank: int = 0
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None

    @property
    def is_storage_writer(self) -> bool:
        """Always: see above."""
        return True


@dataclass
class ExtraInfo:
    """What SGLang passes as ``extra_info``; our keys need no prefix beside them."""

    prefix_keys: list[str] | None = None
    extra_info: dict[str, object] | None = None


@dataclass
class StagingPool:
    """The host pool that a v1 class registers: slots of one page, one token a page.

    Attributes:
        slot_nbytes: size of a slot.
        n_slots: how many there are.
        kv_buffer: all of them, uint8, (n_slots, slot_nbytes).
        page_size, layout, dtype, device: what SGLang's host pools have under these names.
    """

    slot_nbytes: int
    n_slots: int
    page_size: int = 1
    layout: str = "page_first"
    dtype: torch.dtype = torch.uint8
    device: str = "cpu"
    kv_buffer: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.kv_buffer = torch.empty((self.n_slots, self.slot_nbytes), dtype=torch.uint8)
        self._free = list(range(self.n_slots))
        self._changed = threading.Condition()

    @contextmanager
    def slots(self, n: int) -> Iterator[list[int]]:
        """``n`` slots for the caller's use; waits until so many are free.

        Raises:
            BackendTimeout: calls that do not return hold the slots.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._free) >= n, _SLOT_WAIT_S):
                raise BackendTimeout(f"no {n} staging slots came free within {_SLOT_WAIT_S:g} s")
            taken = [self._free.pop() for _ in range(n)]
        try:
            yield taken
        finally:
            with self._changed:
                self._free.extend(taken)
                self._changed.notify_all()

    def bytes_of(self, slot: int) -> memoryview:
        """The memory of one slot."""
        return self.kv_buffer[slot].numpy().data

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and sizes of the pages at ``indices`` (int64, one for each page)."""
        base = self.kv_buffer.data_ptr()
        pointers = [base + int(index) * self.slot_nbytes for index in indices]
        return pointers, [self.slot_nbytes] * len(pointers)
