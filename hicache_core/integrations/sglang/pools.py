"""Pages of SGLang's host pools, as the memoryviews that a store reads and writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Protocol

import torch

from hicache_core.errors import SpecError
from hicache_core.types import Page

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


class HostPool(Protocol):
    """What we use of SGLang's host pools."""

    layout: str
    page_size: int
    size: int
    dtype: torch.dtype
    kv_buffer: object

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor: ...
    def get_dummy_flat_data_page(self) -> torch.Tensor: ...
    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None: ...
    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]] | None: ...


class PoolPages(ABC):
    """The pages of one host pool.

    Attributes:
        nbytes: of a page.
        n_tokens: slots of the pool that a page takes.
        is_flat: whether a page has its bytes in the order of ``get_data_page(flat=True)``.
        buffers: the memory that pages lie in; empty if they are copied.
    """

    is_flat = True

    def __init__(self, pool: HostPool) -> None:
        self.pool = pool
        self.n_tokens = pool.page_size
        self.nbytes = 0
        self.buffers: Sequence[memoryview] = ()

    def flat(self, tensors: Sequence[torch.Tensor]) -> Sequence[Page]:
        """Returns the memory of pages that are contiguous tensors.

        Raises:
            SpecError: a tensor is not a page, or this pool's pages are in another order.
        """
        if not self.is_flat:
            raise SpecError("the pages of this pool are not in the order of the generic path")
        for tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            if nbytes != self.nbytes or not tensor.is_contiguous():
                raise SpecError(
                    f"a page has {self.nbytes} bytes in one piece; got a tensor of {nbytes} bytes"
                    f" and strides {tensor.stride()}"
                )
        return [(bytes_of(tensor),) for tensor in tensors]

    @abstractmethod
    def sources(self, indices: torch.Tensor) -> Sequence[Page]:
        """Returns the pages at ``indices`` (int64, ``n_tokens`` for each page), to be stored."""

    @abstractmethod
    def read(
        self, indices: torch.Tensor, read: Callable[[Sequence[Page]], Sequence[bool]]
    ) -> Sequence[bool]:
        """Fills the pages at ``indices``.

        Args:
            indices: slots, int64, ``n_tokens`` for each page.
            read: fills the pages that it is given, and says which it filled.

        Returns:
            What ``read`` returned.
        """


class CopiedPages(PoolPages):
    """Pages that the pool copies out and in, since it gives no addresses."""

    def __init__(self, pool: HostPool) -> None:
        super().__init__(pool)
        self.nbytes = bytes_of(pool.get_dummy_flat_data_page()).nbytes
        n_copied = bytes_of(pool.get_data_page(0)).nbytes
        if n_copied != self.nbytes:
            raise SpecError(f"it has pages of {n_copied} bytes, and empty ones of {self.nbytes}")

    def sources(self, indices: torch.Tensor) -> Sequence[Page]:
        # docstring inherited
        return [(bytes_of(self.pool.get_data_page(first)),) for first in self._firsts(indices)]

    def read(
        self, indices: torch.Tensor, read: Callable[[Sequence[Page]], Sequence[bool]]
    ) -> Sequence[bool]:
        # docstring inherited
        firsts = self._firsts(indices)
        copies = [self.pool.get_dummy_flat_data_page() for _ in firsts]
        mask = read([(bytes_of(copy),) for copy in copies])
        for first, copy, filled in zip(firsts, copies, mask, strict=True):
            if filled:
                self.pool.set_from_flat_data_page(first, copy)
        return mask

    def _firsts(self, indices: torch.Tensor) -> list[int]:
        firsts: list[int] = indices[:: self.n_tokens].tolist()
        return firsts


class MappedPages(PoolPages):
    """Pages as slices of the pool's own memory: nothing is copied.

    A page has a segment or more. In a pool that is one buffer they are put in the order of their
    addresses, which is the order that ``get_data_page`` flattens them in.
    """

    def __init__(self, pool: HostPool) -> None:
        """Looks at the first and the last page of ``pool``.

        Raises:
            SpecError: the pool's addresses are not inside its buffers.
        """
        super().__init__(pool)
        first = self._meta(torch.arange(self.n_tokens))
        last = self._meta(torch.arange(pool.size - self.n_tokens, pool.size))
        buffers = _buffers(pool)
        places = [_place(buffers, *ends) for ends in zip(first, last, strict=True)]
        if None in places or not places:
            raise SpecError(
                f"{type(pool).__name__} gives addresses outside its {len(buffers)} buffers"
            )
        self.buffers = [view for _, view in buffers]
        self._slots = [buffers[place] for place in places if place is not None]
        self.nbytes = sum(nbytes for _, nbytes in first)
        self.is_flat = len(buffers) == 1
        order = sorted(range(len(first)), key=lambda n: first[n][0]) if self.is_flat else None
        self._order = None if order == sorted(order or ()) else order

    def sources(self, indices: torch.Tensor) -> Sequence[Page]:
        # docstring inherited
        n_segments = len(self._slots)
        segments = [
            view[pointer - start : pointer - start + nbytes]
            for (pointer, nbytes), (start, view) in zip(
                self._meta(indices), cycle(self._slots), strict=False
            )
        ]
        if n_segments == 1:
            return [(segment,) for segment in segments]
        pages = [segments[n : n + n_segments] for n in range(0, len(segments), n_segments)]
        if self._order is not None:
            return [[page[n] for n in self._order] for page in pages]
        return pages

    def read(
        self, indices: torch.Tensor, read: Callable[[Sequence[Page]], Sequence[bool]]
    ) -> Sequence[bool]:
        # docstring inherited
        return read(self.sources(indices))

    def _meta(self, indices: torch.Tensor) -> list[tuple[int, int]]:
        """Returns address and size of each segment of each page."""
        meta = self.pool.get_page_buffer_meta(indices)
        return [] if meta is None else list(zip(*meta, strict=True))


def pages_of(pool: HostPool, *, flat: bool) -> PoolPages:
    """Returns the pages of a host pool, after a look at its first and last.

    They are the pool's own memory if it gives addresses, else copies.

    Args:
        pool: SGLang's.
        flat: their bytes must be in the order of ``get_data_page``.

    Raises:
        SpecError: the layout is not known, the pool is sharded, or it gives neither addresses nor
            copies.
    """
    if pool.layout not in LAYOUTS:
        raise SpecError(
            f"the host pool has layout {pool.layout!r}; --hicache-mem-layout must be one of"
            f" {', '.join(LAYOUTS)}"
        )
    kind = type(pool).__name__
    if getattr(pool, "logical_size", pool.size) != pool.size:
        raise SpecError(
            f"{kind} shares out its pages over several ranks; start SGLang without decode context"
            " parallelism and without KV sharding"
        )
    mapped = _mapped(pool)
    if mapped is not None and (mapped.is_flat or not flat):
        return mapped
    try:
        return CopiedPages(pool)
    except (NotImplementedError, ValueError) as error:
        raise SpecError(
            f"{kind} with layout {pool.layout!r} gives neither addresses nor copies of its pages"
            f" ({error}); choose another --hicache-mem-layout"
        ) from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor; a copy if it is not contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _mapped(pool: HostPool) -> MappedPages | None:
    """Returns the pages as the pool's memory; None if it gives no addresses."""
    try:
        return MappedPages(pool)
    except (NotImplementedError, ValueError):
        return None


def _buffers(pool: HostPool) -> list[tuple[int, memoryview]]:
    """Returns address and memory of each buffer that the pool names."""
    found = pool.kv_buffer
    if not isinstance(found, torch.Tensor | list | tuple):
        hybrid = getattr(pool, "get_hybrid_pool_buffer", None)
        found = hybrid() if callable(hybrid) else ()
    tensors = [found] if isinstance(found, torch.Tensor) else list(found)
    return [(one.data_ptr(), bytes_of(one)) for one in tensors if one.is_contiguous()]


def _place(
    buffers: Sequence[tuple[int, memoryview]], first: tuple[int, int], last: tuple[int, int]
) -> int | None:
    """Returns which buffer holds both ends of a segment's way through the pool."""
    for n, (start, view) in enumerate(buffers):
        if all(
            start <= pointer and pointer + nbytes <= start + view.nbytes
            for pointer, nbytes in (first, last)
        ):
            return n
    return None
