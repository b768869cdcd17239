"""Which prefixes SGLang can restore from what the store has of a side pool."""

from __future__ import annotations

from collections.abc import Sequence

from hicache_core.storage.answers import n_leading


def all_pages(present: Sequence[bool]) -> list[int]:
    """Returns the lengths of the prefixes of which every page is present."""
    return list(range(1, n_leading(present) + 1))


def trailing_pages(present: Sequence[bool], window: int) -> list[int]:
    """Returns the lengths of the prefixes of which the last pages are present.

    Args:
        present: for each page of the prefix.
        window: how many pages must be there; all of a shorter prefix.
    """
    lengths, run = [], 0
    for n, there in enumerate(present, start=1):
        run = run + 1 if there else 0
        if run >= min(window, n):
            lengths.append(n)
    return lengths


def block_groups(present: Sequence[bool], block_pages: int, group_pages: int) -> int:
    """Returns how many pages of the prefix the leading complete groups cover.

    Args:
        present: for each key of the groups, one group after the other.
        block_pages: pages of the prefix that a group covers.
        group_pages: keys of a group.
    """
    if group_pages <= 0:
        return 0
    return n_leading(present) // group_pages * block_pages
