"""Marks of the pages in use in pure Python: the twin of _page_marks.c."""

from __future__ import annotations

from array import array


def flip(marks: bytearray, page_ids: array[int], value: bool) -> bool:
    """Sets the mark of every page in ``page_ids``, or of none.

    Args:
        marks: a byte for each page of the pool.
        page_ids: the pages.
        value: the new mark.

    Returns:
        False, with no mark changed, if an id is not a page, has this mark already, or occurs twice.
    """
    for n, page in enumerate(page_ids):
        if not 0 <= page < len(marks) or marks[page] == value:
            for changed in page_ids[:n]:
                marks[changed] = not value
            return False
        marks[page] = value
    return True


def are_pages(page_ids: array[int], n_pages: int) -> bool:
    """Whether each of ``page_ids`` is from 0 to ``n_pages - 1``."""
    return not page_ids or (min(page_ids) >= 0 and max(page_ids) < n_pages)
