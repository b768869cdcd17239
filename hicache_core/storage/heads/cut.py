"""Cuts a page by KV heads: which bytes of a page belong to which group of heads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hicache_core.errors import SpecError
from hicache_core.kv.keys import storage_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.layout import HostLayout, PoolShape
from hicache_core.types import Page

Bytes: TypeAlias = NDArray[np.uint8]


class _Row(NamedTuple):
    """The place of one row (component, layer, token) in a page's object.

    Attributes:
        segment: index of the segment in the payload.
        start: offset of the first byte in that segment.
        nbytes: bytes of the row.
        group_nbytes: how many of them each group has: all, if the heads share the row.
    """

    segment: int
    start: int
    nbytes: int
    group_nbytes: int


class _Run(NamedTuple):
    """Adjacent rows of the same length.

    ::

        page's segment   row 0: head 0, head 1, head 2, head 3 │ row 1: head 0, …
        group 0 of 2     row 0: head 0, head 1 │ row 1: head 0, head 1 │ …
        group 1 of 2     row 0: head 2, head 3 │ row 1: head 2, head 3 │ …

    Rows that all heads share are in each group as they are.

    Attributes:
        segment: index of the segment in the payload.
        start: offset of the first byte in that segment.
        n_rows: number of rows.
        nbytes: bytes of a row.
        group_start: offset of the first byte in the payload of each group.
        group_nbytes: bytes of a row that belong to each group.
    """

    segment: int
    start: int
    n_rows: int
    nbytes: int
    group_start: int
    group_nbytes: int


def head_group_specs(spec: KVSpec, group: int) -> list[KVSpec]:
    """Returns the specs of ranks with ``group`` KV heads each that together hold ``spec``.

    Args:
        spec: what a rank holds.
        group: number of KV heads in one object.

    Raises:
        SpecError: ``group`` does not divide the heads of the rank, or these do not start at a
            multiple of it, so that fleets of other sizes would cut at other heads.
    """
    start, stop, total = spec.heads
    if group < 1 or (stop - start) % group or start % group:
        raise SpecError(
            f"storage_head_group {group} does not cut KV heads {start} to {stop} (of {total}) into "
            "whole groups that start at its multiples; set it to a divisor of the heads of every "
            "rank, or do not set it (MLA has no heads to cut by)"
        )
    return [spec.shard(heads=(first, first + group)) for first in range(start, stop, group)]


def head_group_namespaces(spec: KVSpec, page_size: int, layout: str, group: int) -> list[str]:
    """Returns the storage namespace of each group of heads of a rank, in order of the heads.

    Each is the namespace of a rank with exactly those heads. So fleets of other sizes find the same
    objects under the same keys.

    Args:
        spec: what the rank holds.
        page_size: tokens in a page.
        layout: name of the host layout.
        group: number of KV heads in one object.

    Raises:
        SpecError: as ``head_group_specs``.
    """
    return [
        storage_namespace(part.identity(), page_size, layout)
        for part in head_group_specs(spec, group)
    ]


class HeadCut:
    """Copies pages of one shape to groups of heads and back. Immutable; any thread may use it.

    Attributes:
        n_groups: number of groups in a page.
        segment_nbytes: lengths of the segments of a page's payload, in bytes.
        group_nbytes: length of the payload of each group, in bytes.
    """

    def __init__(self, spec: KVSpec, page_size: int, layout: HostLayout, group: int) -> None:
        """Computes which bytes go where.

        Args:
            spec: what a rank holds.
            page_size: tokens in a page.
            layout: of the host pool.
            group: number of KV heads in one object.

        Raises:
            SpecError: as ``head_group_specs``, or a group would have a part of a component's head.
        """
        parts = head_group_specs(spec, group)
        self.n_groups = len(parts)
        shape = PoolShape(spec, page_size, n_pages=1)
        self.segment_nbytes = [stop - start for start, stop in layout.segments(shape, 0)]
        self._runs = list(_runs(_rows(shape, layout, parts[0])))
        self.group_nbytes = parts[0].page_nbytes(page_size)

    def split(self, payload: Page, groups: Bytes) -> None:
        """Copies the payload of a page to its groups.

        Args:
            payload: the segments of a page without its header.
            groups: uint8 ``(n_groups, group_nbytes)``, each row contiguous; is written.

        Raises:
            ValueError: the segments do not have the lengths of this layout.
        """
        for whole, part in self._pairs(payload, groups):
            np.copyto(part, whole)

    def join(self, groups: Bytes, payload: Page) -> None:
        """Copies groups to their places in the payload of a page; the inverse of ``split``."""
        for whole, part in self._pairs(payload, groups):
            np.copyto(whole, part[: len(whole)])

    def _pairs(self, payload: Page, groups: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
        """Yields views of each run in page and groups, ``(n_groups, n_rows, group_nbytes)``.

        That of a page has one group, not ``n_groups``, where all heads share the rows.
        """
        found = [segment.nbytes for segment in payload]
        if found != self.segment_nbytes:
            raise ValueError(f"expected segments of {self.segment_nbytes} bytes, found {found}")
        segments = [np.frombuffer(segment, np.uint8) for segment in payload]
        for run in self._runs:
            whole = segments[run.segment][run.start : run.start + run.n_rows * run.nbytes]
            part = groups[:, run.group_start : run.group_start + run.n_rows * run.group_nbytes]
            yield (
                whole.reshape(run.n_rows, -1, run.group_nbytes).transpose(1, 0, 2),
                part.reshape(self.n_groups, run.n_rows, run.group_nbytes),
            )


def _rows(shape: PoolShape, layout: HostLayout, part: KVSpec) -> list[_Row]:
    """Returns every row of page 0, in the order of the object.

    Args:
        shape: of a pool of one page.
        layout: of that pool.
        part: spec of the first group.
    """
    segments = layout.segments(shape, 0)
    by_start = sorted((start, index) for index, (start, _) in enumerate(segments))
    starts = [start for start, _ in by_start]
    rows = []
    places = layout.placements(shape)
    for component, of_group, place in zip(
        shape.spec.components, part.components, places, strict=True
    ):
        for layer in range(len(shape.spec.layers_of(component))):
            for token in range(shape.page_size):
                at = place.offset + layer * place.layer_stride + token * place.token_stride
                start, index = by_start[bisect_right(starts, at) - 1]
                rows.append(_Row(index, at - start, place.row_nbytes, of_group.row_nbytes))
    return sorted(rows)


def _runs(rows: Sequence[_Row]) -> Iterator[_Run]:
    """Yields the rows merged into as few runs as possible."""
    group_starts = list(accumulate((row.group_nbytes for row in rows), initial=0))
    first = 0
    for n, row in enumerate(rows):
        following = rows[n + 1] if n + 1 < len(rows) else None
        goes_on = following is not None and following == (
            row.segment,
            row.start + row.nbytes,
            row.nbytes,
            row.group_nbytes,
        )
        if not goes_on:
            yield _Run(
                rows[first].segment,
                rows[first].start,
                n + 1 - first,
                row.nbytes,
                group_starts[first],
                row.group_nbytes,
            )
            first = n + 1
