"""Host pools as SGLang's: one buffer of memory, and where each page lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

N_PAGES = 8
PAGE_SIZE = 4
LAYERS, HEADS, DIM = 3, 2, 8

_SHAPES = {
    "layer_first": (2, LAYERS, N_PAGES * PAGE_SIZE, HEADS, DIM),
    "page_first": (2, N_PAGES * PAGE_SIZE, LAYERS, HEADS, DIM),
    "page_first_direct": (2, N_PAGES, LAYERS, PAGE_SIZE, HEADS, DIM),
    "page_head": (2, N_PAGES, HEADS, PAGE_SIZE, LAYERS, DIM),
}


class Pool:
    """Keys and values of ``N_PAGES`` pages with heads, bfloat16, filled with random bytes."""

    layer_num, start_layer, end_layer = LAYERS, 0, LAYERS
    page_size, size, dtype = PAGE_SIZE, N_PAGES * PAGE_SIZE, torch.bfloat16

    def __init__(self, layout: str = "page_first") -> None:
        self.layout = layout
        self.head_num, self.head_dim = HEADS, DIM
        self.kv_buffer: Any = torch.empty(_SHAPES[layout], dtype=self.dtype)
        self.kv_buffer.view(torch.uint8).random_(0, 255)

    def view(self, first: int) -> torch.Tensor:
        """The page whose first slot is ``first``, in the pool's own memory."""
        axis = 2 if self.layout == "layer_first" else 1
        if self.layout in ("layer_first", "page_first"):
            return self.kv_buffer.narrow(axis, first, PAGE_SIZE)
        return self.kv_buffer.narrow(axis, first // PAGE_SIZE, 1)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self.view(index).flatten() if flat else self.view(index)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.view(0)).flatten()

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self.view(index).copy_(data_page.reshape(self.view(index).shape))

    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        """Keys and values in turn, as SGLang's: layer for layer if the layers lie apart."""
        pointers: list[int] = []
        sizes: list[int] = []
        for first in indices[::PAGE_SIZE].tolist():
            page = self.view(first)
            parts = [page[0], page[1]]
            if self.layout == "layer_first":
                parts = [page[side, layer] for layer in range(LAYERS) for side in (0, 1)]
            pointers += [part.data_ptr() for part in parts]
            sizes += [part.numel() * part.element_size() for part in parts]
        return pointers, sizes


class PoolWithoutAddresses(Pool):
    """As some of SGLang's side pools."""

    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        raise NotImplementedError("no zero copy here")


class PoolOfSlots(Pool):
    """As SGLang's logical pool: slots, and no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_buffer = None

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        assert data_page.numel() == 0

    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        return None


def slots(pages: Sequence[int]) -> torch.Tensor:
    """The slots of some pages."""
    return torch.cat([torch.arange(n * PAGE_SIZE, (n + 1) * PAGE_SIZE) for n in pages])


def content(pool: Pool, page: int) -> bytes:
    """The bytes of a page."""
    return pool.get_data_page(page * PAGE_SIZE).view(torch.uint8).numpy().tobytes()


def storage_config(**changed: object) -> Any:
    """One rank of a model with heads, as SGLang describes it to a storage backend."""
    fields = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "model_name": "a model",
        "should_split_heads": False,
        "dp_rank": 0,
        "extra_config": None,
    }
    return SimpleNamespace(**fields | changed)
