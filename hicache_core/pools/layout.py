"""The three host layouts: where the bytes of a page are in the host pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from hicache_core.errors import SpecError
from hicache_core.kv.spec import Component, KVSpec

REGION_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of one component are; all in bytes.

    Row (page, layer, token) starts at ``offset + page * page_stride + layer * layer_stride +
    token * token_stride``, and is ``row_nbytes`` long without a gap. ``layer`` counts the layers
    that have the component.
    """

    offset: int
    page_stride: int
    layer_stride: int
    token_stride: int
    row_nbytes: int


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What a layout must know about a host pool.

    Attributes:
        spec: what a token's row is.
        page_size: tokens of a page.
        n_pages: pages.
        page_nbytes: bytes of a page.
        by_layer: (component, its layer) of every chunk of a page, layer by layer; a chunk is what a
            page has of one component in one layer.
    """

    spec: KVSpec
    page_size: int
    n_pages: int
    page_nbytes: int = field(init=False)
    by_layer: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Computes what is asked for each page."""
        layers = range(self.spec.num_layers)
        chunks = tuple(chunk for layer in layers for chunk in self.spec.components_in(layer))
        object.__setattr__(self, "page_nbytes", self.spec.page_nbytes(self.page_size))
        object.__setattr__(self, "by_layer", chunks)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(bytes of a row, layers that have one) of each component."""
        spec = self.spec
        return [(c.row_nbytes, len(spec.layers_of(c))) for c in spec.components]


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
    def chunks(self, shape: PoolShape) -> list[tuple[int, int]]:
        """The payload of page 0 as (start, length) in bytes, in object order.

        The chunk of page ``p`` starts ``p`` lengths further on.
        """

    def segments(self, shape: PoolShape, page: int) -> list[tuple[int, int]]:
        """The payload of ``page`` as (start, stop) byte ranges, in object order."""
        chunks = self.chunks(shape)
        return [(at + page * nbytes, at + (page + 1) * nbytes) for at, nbytes in chunks]

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
        for row_nbytes, n_layers in shape.parts:
            chunk = row_nbytes * shape.page_size
            layer = chunk * shape.n_pages
            result.append(Placement(start, chunk, layer, row_nbytes, row_nbytes))
            start = _aligned(start + layer * n_layers)
        return result

    def chunks(self, shape: PoolShape) -> list[tuple[int, int]]:
        # docstring inherited
        places = self.placements(shape)
        return [
            (places[c].offset + layer * places[c].layer_stride, places[c].page_stride)
            for c, layer in shape.by_layer
        ]

    def nbytes(self, shape: PoolShape) -> int:
        # docstring inherited
        ends = (
            place.offset + place.layer_stride * n_layers
            for place, (_, n_layers) in zip(self.placements(shape), shape.parts, strict=True)
        )
        return max(ends, default=0)


class PageFirst(HostLayout):
    """A page is one block; inside it, for each component, tokens are outermost.

    ::

        pool     page 0                        │ page 1 …
        page     component 0                   │ component 1
                 token 0           │ token 1   │ token 0 …
                 layer 0, layer 1, … (a row each, of the layers that have the component)

        object   the block

    All of a token's layers lie together, so a copy of one layer touches rows far apart: for the
    ``kernel`` io backend only.
    """

    name = "page_first"

    def placements(self, shape: PoolShape) -> list[Placement]:
        # docstring inherited
        result, start = [], 0
        for row_nbytes, n_layers in shape.parts:
            token = row_nbytes * n_layers
            result.append(Placement(start, shape.page_nbytes, row_nbytes, token, row_nbytes))
            start += token * shape.page_size
        return result

    def chunks(self, shape: PoolShape) -> list[tuple[int, int]]:
        # docstring inherited
        return _block(shape)


class PageFirstDirect(HostLayout):
    """A page is one block; inside it, layers are outermost.

    ::

        pool     page 0                                        │ page 1 …
        page     layer 0                           │ layer 1 …
                 component 0         │ component 1 │
                 token 0, token 1, … │ token 0, …

        object   the block

    A layer of a page is contiguous on both sides: one plain copy for each component. Components
    that live in other layers follow as a block of the same order, one for each set of layers.
    """

    name = "page_first_direct"

    def placements(self, shape: PoolShape) -> list[Placement]:
        # docstring inherited
        blocks: dict[tuple[int, ...] | None, list[Component]] = {}
        for component in shape.spec.components:
            blocks.setdefault(component.layers, []).append(component)
        places, start = {}, 0
        for block in blocks.values():
            layer = sum(component.row_nbytes for component in block) * shape.page_size
            offset = start
            for component in block:
                row = component.row_nbytes
                places[component.name] = Placement(offset, shape.page_nbytes, layer, row, row)
                offset += row * shape.page_size
            start += layer * len(shape.spec.layers_of(block[0]))
        return [places[component.name] for component in shape.spec.components]

    def chunks(self, shape: PoolShape) -> list[tuple[int, int]]:
        # docstring inherited
        return _block(shape)


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


def _block(shape: PoolShape) -> list[tuple[int, int]]:
    """A page in one piece; nothing of a page without bytes."""
    return [(0, shape.page_nbytes)] if shape.page_nbytes else []


def _aligned(nbytes: int) -> int:
    return -(-nbytes // REGION_ALIGNMENT) * REGION_ALIGNMENT
