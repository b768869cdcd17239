"""L2: the pages in host memory, as storage backends read and write them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch

from hicache_core.errors import SpecError, UseAfterClose
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.allocator import PageAllocator, check_page_ids
from hicache_core.pools.layout import HostLayout, PoolShape
from hicache_core.pools.limits import check_memory
from hicache_core.pools.mapping import Progress, map_memory, pin_memory, unpin_memory
from hicache_core.types import Page

HEADER_NBYTES = 64
"""Bytes of the header of a page's sealed object, kept apart from the payload."""


class HostPool:
    """One flat block of host memory, its order given by a layout, and its allocator.

    ::

        │ payload of all pages, in the layout's order │ 64-byte headers, page 0, page 1, … │

    The owner thread allocates and frees; a storage worker reads and writes only the pages that its
    job names, through ``pages``.

    Attributes:
        spec: what a token's row is.
        page_size: tokens of a page.
        n_pages: pages.
        layout: the order of the bytes.
        pinned: whether the block is registered with CUDA.
        allocator: which pages are free; owner thread only.
    """

    def __init__(
        self,
        spec: KVSpec,
        page_size: int,
        n_pages: int,
        layout: HostLayout,
        *,
        pin: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Allocates the block and faults it in.

        Args:
            spec: what a token's row is.
            page_size: tokens of a page.
            n_pages: pages.
            layout: the order of the bytes.
            pin: register the block with CUDA, so that copies to and from a GPU are asynchronous.
            progress: called after every GiB with (bytes done, bytes in all).

        Raises:
            SpecError: page_size or n_pages is not positive.
            NotEnoughMemory: the machine or its cgroup has less memory left; nothing was allocated.
        """
        if page_size < 1:
            raise SpecError(f"page_size must be positive, found {page_size}")
        self.spec = spec
        self.page_size = page_size
        self.n_pages = n_pages
        self.layout = layout
        self.allocator = PageAllocator(n_pages)
        self.shape = PoolShape(spec, page_size, n_pages)
        self._payload_nbytes = layout.nbytes(self.shape)
        nbytes = self._payload_nbytes + HEADER_NBYTES * n_pages
        check_memory(nbytes, f"host pool of {n_pages} pages")
        self._memory: memoryview | None = map_memory(nbytes, progress)
        self._cutter: _Cutter | None = _Cutter(
            self._memory, self._payload_nbytes, layout.chunks(self.shape), n_pages
        )
        self._flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.pinned = pin
        if pin:
            pin_memory(self._flat)

    @property
    def nbytes(self) -> int:
        """Bytes of the block, headers included."""
        return self._payload_nbytes + HEADER_NBYTES * self.n_pages

    @property
    def object_nbytes(self) -> int:
        """Bytes of a page's stored object, header included."""
        return HEADER_NBYTES + self.shape.page_nbytes

    @property
    def buffers(self) -> list[memoryview]:
        """All memory that ``pages`` can lie in, for transports that must register it."""
        return [self._open_memory()]

    def rows(self, component: int) -> torch.Tensor:
        """The rows of a component as bytes: uint8 (n_pages, n_layers, page_size, row_nbytes).

        ``n_layers`` is that of the layers that have the component. A strided view; what is written
        to it is in the pool.
        """
        self._open_memory()
        place = self.layout.placements(self.shape)[component]
        n_layers = len(self.spec.layers_of(self.spec.components[component]))
        sizes = (self.n_pages, n_layers, self.page_size, place.row_nbytes)
        strides = (place.page_stride, place.layer_stride, place.token_stride, 1)
        return self._flat.as_strided(sizes, strides, place.offset)

    def view(self, component: int) -> torch.Tensor:
        """The rows of a component in their dtype: (n_pages, n_layers, page_size, *shape).

        Raises:
            SpecError: in this layout the rows are not aligned for their dtype, since a component
                of odd size precedes them. ``rows`` always works.
        """
        kind = self.spec.components[component]
        rows = self.rows(component)
        try:
            typed = rows.view(getattr(torch, kind.dtype))
        except RuntimeError as error:
            raise SpecError(
                f"component {kind.name!r} ({kind.dtype}) is not aligned in layout "
                f"{self.layout.name}: {error}"
            ) from error
        return typed.view(*typed.shape[:-1], *kind.shape)

    def pages(self, page_ids: Iterable[int]) -> Sequence[Page]:
        """The pages as segments, for a storage job: each is (header, *payload in object order).

        Lazy: segments are made when a page is looked at, on the thread that looks.

        Raises:
            IntegrityError: a page id is not of this pool.
        """
        if self._cutter is None:
            raise UseAfterClose("the host pool is closed")
        ids = array("i", page_ids)
        check_page_ids(ids, self.n_pages, "host")
        return _Pages(self._cutter, ids)

    def close(self) -> None:
        """Frees the memory once no view of it is left; a second call does nothing.

        Any other call afterwards raises ``UseAfterClose``.
        """
        if self._memory is None:
            return
        if self.pinned:
            unpin_memory(self._flat)
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._cutter = None
        self._memory = None

    def _open_memory(self) -> memoryview:
        if self._memory is None:
            raise UseAfterClose("the host pool is closed")
        return self._memory


class _Cutter:
    """Cuts pages out of the memory of a pool.

    A page of a model of 30 layers may have 60 segments, so all that is the same for all pages is
    computed once: for each segment of a page, a view of that segment of all pages.
    """

    def __init__(
        self, memory: memoryview, headers_at: int, chunks: Sequence[tuple[int, int]], n_pages: int
    ) -> None:
        """Makes the views.

        Args:
            memory: of the pool.
            headers_at: where the headers of all pages start, in bytes.
            chunks: (start, length) in bytes of each payload segment of page 0; that of page ``p``
                starts ``p`` lengths further on.
            n_pages: of the pool.
        """
        self._headers = memory[headers_at : headers_at + n_pages * HEADER_NBYTES]
        self._views = [memory[at : at + n_pages * nbytes] for at, nbytes in chunks]
        self._lengths = sorted({nbytes for _, nbytes in chunks})
        self._numbers = [self._lengths.index(nbytes) for _, nbytes in chunks]

    def page(self, page: int) -> Page:
        """The segments of a page."""
        at = page * HEADER_NBYTES
        header = self._headers[at : at + HEADER_NBYTES]
        if len(self._lengths) == 1:  # of most models all are equally long
            (nbytes,) = self._lengths
            part = slice(page * nbytes, (page + 1) * nbytes)
            return (header, *[view[part] for view in self._views])
        parts = [slice(page * nbytes, (page + 1) * nbytes) for nbytes in self._lengths]
        pairs = zip(self._views, self._numbers, strict=True)
        return (header, *[view[parts[n]] for view, n in pairs])


class _Pages(Sequence[Page]):
    """Pages of a host pool, made into segments one by one."""

    def __init__(self, cutter: _Cutter, ids: array[int]) -> None:
        self._cutter = cutter
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Page: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Page]: ...
    def __getitem__(self, index: int | slice) -> Page | Sequence[Page]:
        if isinstance(index, slice):
            return _Pages(self._cutter, self._ids[index])
        return self._cutter.page(self._ids[index])

    def __iter__(self) -> Iterator[Page]:
        return map(self._cutter.page, self._ids)
