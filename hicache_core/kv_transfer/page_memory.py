"""PageMemory: where the rows of pages are in memory, for transports; does not need torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hicache_core.errors import SpecError
from hicache_core.kv.spec import Component, KVSpec

Heads = tuple[int, int]
"""(start, stop) of the model's KV heads."""


@dataclass(frozen=True, slots=True)
class PageMemory:
    """The pages of one rank, as bytes.

    Attributes:
        spec: layout of a token's row, and the heads of the model that this rank has.
        page_size: tokens of a page.
        n_pages: number of pages.
        regions: ``regions[component][i]``, a writable memoryview of bytes in which page p starts
            at ``p * page_size * row_nbytes`` of the component, for the i-th layer that has it.
        groups: the memory of each group of layers of the spec.
    """

    spec: KVSpec
    page_size: int
    n_pages: int
    regions: Sequence[Sequence[memoryview]]
    groups: Sequence[PageMemory] = ()

    def __post_init__(self) -> None:
        """Raises SpecError if the regions do not match the pages of the spec."""
        if [memory.spec for memory in self.groups] != [group.spec for group in self.spec.groups]:
            names = [group.name for group in self.spec.groups]
            raise SpecError(f"need the memory of groups {names}, got {len(self.groups)}")
        if len(self.regions) != len(self.spec.components):
            raise SpecError(
                f"need regions of {len(self.spec.components)} components, got {len(self.regions)}"
            )
        for component, layers in zip(self.spec.components, self.regions, strict=True):
            nbytes = component.row_nbytes * self.page_size * self.n_pages
            found, n_layers = [r.nbytes for r in layers], len(self.spec.layers_of(component))
            if found != [nbytes] * n_layers:
                raise SpecError(
                    f"component {component.name}: need {n_layers} layers of {nbytes} "
                    f"bytes, found {found}"
                )

    def identity(self) -> dict[str, object]:
        """What must be equal on both sides, whichever heads they have; JSON types only."""
        return {
            "model_fingerprint": self.spec.model_fingerprint,
            "page_size": self.page_size,
            "layers": list(self.spec.layers),
            "total_heads": self.spec.heads[2],
            "components": [self._identity_of(component) for component in self.spec.components],
            **self._identity_of_groups(),
        }

    def _identity_of_groups(self) -> dict[str, object]:
        both = zip(self.spec.groups, self.groups, strict=True)
        groups = [[group.name, group.window, memory.identity()] for group, memory in both]
        return {"groups": groups} if groups else {}

    def _identity_of(self, component: Component) -> list[object]:
        """Name, dtype and bytes of a head; the layers of a component that only some have."""
        layers = [] if component.layers is None else [list(component.layers)]
        return [component.name, component.dtype, self._share(component, 1), *layers]

    def _share(self, component: Component, n_heads: int) -> int:
        """Bytes of so many of the spec's heads in a row; the whole row if all heads share it."""
        if self.spec.is_shared(component):
            return component.row_nbytes
        start, stop, _ = self.spec.heads
        return component.row_nbytes * n_heads // (stop - start)

    def number(self, layer: int, group: int | None) -> int:
        """One number for a layer of the full pages, or of a group; see ``part``."""
        return layer if group is None else layer + (group + 1) * self.spec.num_layers

    def part(self, number: int) -> tuple[PageMemory, int]:
        """The memory and the layer that ``number`` means.

        Raises:
            SpecError: there is no such group.
        """
        group, layer = divmod(number, self.spec.num_layers)
        if group > len(self.groups):
            raise SpecError(f"layer {number} is of group {group - 1}; {len(self.groups)} are here")
        return (self.groups[group - 1] if group else self), layer

    def heads_in(self, part: PageMemory, heads: Heads) -> Heads:
        """The heads of a part that go with ``heads`` of the full pages.

        They are the same; where a group has another number of them, as states have, each rank has
        all of the group, and they are all.
        """
        return heads if part.spec.heads[2] == self.spec.heads[2] else part.heads

    def every_region(self) -> Iterator[memoryview]:
        """All memory that rows can lie in, groups included, for transports that register it."""
        for layers in self.regions:
            yield from layers
        for memory in self.groups:
            yield from memory.every_region()

    @property
    def heads(self) -> Heads:
        """The KV heads of the model that this rank has."""
        return self.spec.heads[:2]

    def segments(
        self, layer: int, pages: Sequence[int], start: int, stop: int, heads: Heads
    ) -> list[memoryview]:
        """The bytes of ``heads`` of tokens [start, stop) in one layer, in order.

        The order is by component, token and head, the same on both sides however the heads are
        divided. A row that all heads share is sent whole, with any of them. Where whole rows are
        wanted, adjacent pages are one segment. A layer may have no component, and no segment.

        Args:
            layer: index among the layers in memory.
            pages: ids of the pages of the sequence, from its token 0 on.
            start: position of the first token.
            stop: position after the last token.
            heads: a part of the heads that this rank has.
        """
        first, last = self.heads
        if not first <= heads[0] < heads[1] <= last:
            raise SpecError(f"heads {heads} are not a part of the {(first, last)} held here")
        result: list[memoryview] = []
        for index, place in self.spec.components_in(layer):
            component, memory = self.spec.components[index], self.regions[index][place]
            row, nbytes = component.row_nbytes, self._share(component, heads[1] - heads[0])
            offset = self._share(component, heads[0] - first)
            for slot, n_rows in self._runs(pages, start, stop):
                if nbytes == row:
                    result.append(memory[slot * row : (slot + n_rows) * row])
                    continue
                begin = slot * row + offset
                result += (
                    memory[at : at + nbytes] for at in range(begin, begin + n_rows * row, row)
                )
        return result

    def nbytes(self, n_tokens: int, heads: Heads, layer: int = 0) -> int:
        """Bytes of ``heads`` of so many tokens in one layer.

        Args:
            n_tokens: number of tokens.
            heads: a part of the heads that this rank has.
            layer: index among the layers in memory.
        """
        n_heads = heads[1] - heads[0]
        components = (self.spec.components[c] for c, _ in self.spec.components_in(layer))
        return n_tokens * sum(self._share(component, n_heads) for component in components)

    def _runs(self, pages: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(slot, n_rows) of what lies together.

        ::

            tokens   start                         stop
            pages      [ 7 .  .  . ][ 8 .  .  . ][ 3 .  .  . ]
            runs       |------ one run ---------||-- another -|
        """
        size = self.page_size
        slot, n_rows = -1, 0
        for index in range(start // size, -(-stop // size)):
            low = max(start - index * size, 0)
            high = min(stop - index * size, size)
            begin = pages[index] * size + low
            if n_rows and begin == slot + n_rows:
                n_rows += high - low
                continue
            if n_rows:
                yield slot, n_rows
            slot, n_rows = begin, high - low
        if n_rows:
            yield slot, n_rows
