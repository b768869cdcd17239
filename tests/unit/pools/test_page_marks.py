"""The marks of pages in use: the native module and its twin, against a set."""

from __future__ import annotations

from array import array
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.pools import _page_marks_py

try:
    from hicache_core.pools import _page_marks
except ImportError:
    _page_marks = None  # type: ignore[assignment]

MODULES = [module for module in (_page_marks_py, _page_marks) if module is not None]
N_PAGES = 6


@pytest.mark.parametrize("module", MODULES)
@given(
    used=st.sets(st.integers(0, N_PAGES - 1)),
    pages=st.lists(st.integers(-1, N_PAGES), max_size=N_PAGES),
    value=st.booleans(),
)
def test_all_marks_are_flipped_or_none(
    module: ModuleType, used: set[int], pages: list[int], value: bool
) -> None:
    marks = bytearray(page in used for page in range(N_PAGES))
    others = set(range(N_PAGES)) - used if value else used
    may_flip = others.issuperset(pages) and len(set(pages)) == len(pages)
    assert module.flip(marks, array("i", pages), value) is may_flip
    if may_flip:
        used = used | set(pages) if value else used - set(pages)
    assert marks == bytearray(page in used for page in range(N_PAGES))


@pytest.mark.parametrize("module", MODULES)
@given(pages=st.lists(st.integers(-2, N_PAGES + 1)))
def test_pages_are_those_of_the_pool(module: ModuleType, pages: list[int]) -> None:
    expected = all(0 <= page < N_PAGES for page in pages)
    assert module.are_pages(array("i", pages), N_PAGES) is expected
