"""The three host layouts: where the bytes of a page are in the host pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from hicache_core.errors import SpecError
from hicache_core.kv.spec import KVSpec

REGION_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of one component are; all in bytes.

    Row (page, layer, token) starts at ``offset + page * page_stride + layer * layer_stride +
    token * token_stride``, and is ``row_nbytes`` long without a gap.
    """

    offset: int
    page_stride: int
    layer_stride: int
    token_stride: int
    row_nbytes: int


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What a layout must know about a host pool."""

    spec: KVSpec
    page_size: int
    n_pages: int

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page."""
        return self.spec.page_nbytes(self.page_size)

    @property
    def row_nbytes(self) -> list[int]:
        """Bytes of a row, for each component."""
        return [component.row_nbytes for component in self.spec.components]


class HostLayout(ABC):
    """An order of the bytes of a host pool; it has no state, only arithmetic.

    A stored object is a page's segments in order, so a layout also fixes the bytes of objects; its
    name is a part of the storage namespace.
    """

    name: ClassVar[str]

    @abstractmethod
    def placements(self, shape: PoolShape) -> list[Placement]:
        """Where the rows of each component are."""

    @abstractmethod
    def segments(self, shape: PoolShape, page: int) -> list[tuple[int, int]]:
        """The payload of ``page`` as (start, stop) byte ranges, in object order."""

    def nbytes(self, shape: PoolShape) -> int:
        """Bytes of all pages together, including alignment."""
        return shape.page_nbytes * shape.n_pages


class LayerFirst(HostLayout):
    """Like the device: every layer of every component is a region of its own.

    ::

        pool     component 0                   │ component 1
                 layer 0         │ layer 1     │ layer 0 …
                 page 0 │ page 1 │ page 0 …
                 token 0, token 1, …

        object   layer 0: component 0, component 1 │ layer 1: component 0, …   (tokens inside)

    Copies are long for each layer; an object is one segment for each layer and component.
    """

    name = "layer_first"

    def placements(self, shape: PoolShape) -> list[Placement]:
        # docstring inherited
        result, start = [], 0
        for row_nbytes in shape.row_nbytes:
            chunk = row_nbytes * shape.page_size
            layer = chunk * shape.n_pages
            result.append(Placement(start, chunk, layer, row_nbytes, row_nbytes))
            start = _aligned(start + layer * shape.spec.num_layers)
        return result

    def segments(self, shape: PoolShape, page: int) -> list[tuple[int, int]]:
        # docstring inherited
        places = self.placements(shape)
        starts = [
            (place.offset + layer * place.layer_stride + page * place.page_stride, place)
            for layer in range(shape.spec.num_layers)
            for place in places
        ]
        return [(start, start + place.page_stride) for start, place in starts]

    def nbytes(self, shape: PoolShape) -> int:
        # docstring inherited
        last = self.placements(shape)[-1]
        return last.offset + last.layer_stride * shape.spec.num_layers


class PageFirst(HostLayout):
    """A page is one block; inside it, for each component, tokens are outermost.

    ::

        pool     page 0                        │ page 1 …
        page     component 0                   │ component 1
                 token 0           │ token 1   │ token 0 …
                 layer 0, layer 1, … (a row each)

        object   the block

    All of a token's layers lie together, so a copy of one layer touches rows far apart: for the
    ``kernel`` io backend only.
    """

    name = "page_first"

    def placements(self, shape: PoolShape) -> list[Placement]:
        # docstring inherited
        result, start = [], 0
        for row_nbytes in shape.row_nbytes:
            token = row_nbytes * shape.spec.num_layers
            result.append(Placement(start, shape.page_nbytes, row_nbytes, token, row_nbytes))
            start += token * shape.page_size
        return result

    def segments(self, shape: PoolShape, page: int) -> list[tuple[int, int]]:
        # docstring inherited
        return [(page * shape.page_nbytes, (page + 1) * shape.page_nbytes)]


class PageFirstDirect(HostLayout):
    """A page is one block; inside it, layers are outermost.

    ::

        pool     page 0                                        │ page 1 …
        page     layer 0                           │ layer 1 …
                 component 0         │ component 1 │
                 token 0, token 1, … │ token 0, …

        object   the block

    A layer of a page is contiguous on both sides: one plain copy for each component.
    """

    name = "page_first_direct"

    def placements(self, shape: PoolShape) -> list[Placement]:
        # docstring inherited
        chunks = [row_nbytes * shape.page_size for row_nbytes in shape.row_nbytes]
        starts = accumulate(chunks, initial=0)
        return [
            Placement(start, shape.page_nbytes, sum(chunks), row_nbytes, row_nbytes)
            for start, row_nbytes in zip(starts, shape.row_nbytes, strict=False)
        ]

    def segments(self, shape: PoolShape, page: int) -> list[tuple[int, int]]:
        # docstring inherited
        return [(page * shape.page_nbytes, (page + 1) * shape.page_nbytes)]


LAYOUTS: dict[str, HostLayout] = {
    layout.name: layout for layout in (LayerFirst(), PageFirst(), PageFirstDirect())
}
"""Every layout by name."""


def layout_named(name: str) -> HostLayout:
    """The layout ``name``.

    Raises:
        SpecError: it does not exist; the message lists the layouts.
    """
    if name not in LAYOUTS:
        raise SpecError(f"unknown host layout {name!r}; the layouts are: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // REGION_ALIGNMENT) * REGION_ALIGNMENT
