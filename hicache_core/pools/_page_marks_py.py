"""Marks of the pages in use in pure Python: the twin of _page_marks.c."""

from __future__ import annotations

from array import array


def flip(marks: bytearray, page_ids: array[int], value: bool) -> bool:
    """Sets the mark of each page; False, and nothing is changed, if one cannot be set.

    That is one that is no page, is marked so already, or is named twice.
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
