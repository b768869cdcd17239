"""A worker's KV cache, as pages in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hicache_core.errors import ConfigError
from hicache_core.types import Page

_COPIED_AT_ONCE = 64  # blocks; bounds the memory that a copy to a GPU needs beside them


class HostPages:
    """Host memory for some pages; a page is one run of bytes.

    Attributes:
        tensor: ``(n_pages, page_nbytes)``, uint8.
    """

    def __init__(self, n_pages: int, page_nbytes: int, *, pinned: bool) -> None:
        """Allocates the memory; it may hold anything.

        Args:
            n_pages: how many pages.
            page_nbytes: bytes of each.
            pinned: whether a GPU copies from and to it.
        """
        self.tensor = torch.empty((n_pages, page_nbytes), dtype=torch.uint8, pin_memory=pinned)
        self._memory = self.tensor.numpy().data.cast("B")
        self._page_nbytes = page_nbytes

    @property
    def pages(self) -> Sequence[Page]:
        """The memory of each page."""
        nbytes = self._page_nbytes
        return [
            (self._memory[start : start + nbytes],) for start in range(0, len(self._memory), nbytes)
        ]


class Blocks:
    """The blocks of all layers. A page holds the same block of every layer, one after the other.

    Attributes:
        page_nbytes: bytes of a page.
        cuts: of each layer, into how many blocks of its kernel a block is cut, and their shape.
            The order of the bytes depends on them.
    """

    def __init__(
        self, layers: Sequence[str], caches: Mapping[str, torch.Tensor], n_blocks: int
    ) -> None:
        """Looks at the layers as bytes, and copies none.

        Args:
            layers: names, in the order of a page.
            caches: the KV cache of each layer; blocks are its outermost dimension, in which each
                may be cut into several.
            n_blocks: blocks of a layer.

        Raises:
            ConfigError: the bytes of a block are not one run.
        """
        self._layers = [_as_bytes(name, caches[name], n_blocks) for name in layers]
        self._device = self._layers[0].device
        self.page_nbytes = sum(layer.shape[1] for layer in self._layers)
        shapes = [caches[name].shape for name in layers]
        self.cuts = [[shape[0] // n_blocks, *shape[1:]] for shape in shapes]

    def allocate(self, n_pages: int) -> HostPages:
        """Returns host memory for pages; pinned if the cache is on a GPU."""
        return HostPages(n_pages, self.page_nbytes, pinned=self._device.type == "cuda")

    def copy_out(self, block_ids: Sequence[int]) -> HostPages:
        """Returns copies of blocks; nothing refers to the blocks when it returns."""
        host = self.allocate(len(block_ids))
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
        start = 0
        for layer in self._layers:
            nbytes = layer.shape[1]
            host.tensor[:, start : start + nbytes].copy_(layer.index_select(0, ids))
            start += nbytes
        return host

    def copy_in(self, host: HostPages, skip: int, block_ids: Sequence[int]) -> None:
        """Copies pages into blocks.

        On a GPU this takes room there for a layer's part of ``_COPIED_AT_ONCE`` blocks.

        Args:
            host: the pages.
            skip: how many leading ones to leave out.
            block_ids: where the next ones go.

        Raises:
            RuntimeError: the GPU has no room; some of the blocks may have been written.
        """
        for first in range(0, len(block_ids), _COPIED_AT_ONCE):
            some = block_ids[first : first + _COPIED_AT_ONCE]
            self._copy_some_in(host.tensor[skip + first : skip + first + len(some)], some)

    def _copy_some_in(self, pages: torch.Tensor, block_ids: Sequence[int]) -> None:
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
        start = 0
        for layer in self._layers:
            nbytes = layer.shape[1]
            layer.index_copy_(0, ids, pages[:, start : start + nbytes].to(self._device))
            start += nbytes


def _as_bytes(name: str, cache: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """Returns a view of a layer: ``(n_blocks, nbytes of a block)``, uint8."""
    nbytes = cache.numel() * cache.element_size() // n_blocks
    ordered = cache.permute(sorted(range(cache.dim()), key=cache.stride, reverse=True))
    if cache.shape[0] % n_blocks or cache.stride(0) != ordered.stride(0):
        raise ConfigError(f"the KV cache of layer {name!r} is not in blocks: {_shape(cache)}")
    if not ordered.is_contiguous():
        raise ConfigError(
            f"a block of layer {name!r} is not one run of bytes: {_shape(cache)}; "
            "use HiCacheTier, which takes any layout"
        )
    return ordered.view(torch.uint8).reshape(n_blocks, nbytes)


def _shape(cache: torch.Tensor) -> str:
    return f"shape {tuple(cache.shape)}, strides {cache.stride()}"
