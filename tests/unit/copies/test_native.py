"""The native module by itself: what it refuses before it follows an address."""

from __future__ import annotations

import ctypes
from array import array

import pytest

from hicache_core.copies import native

_transfer = pytest.importorskip("hicache_core.copies._transfer", reason="it was not built")

ROW_NBYTES = 16


def address_of(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def plan_of(device: bytearray, host: bytearray) -> bytes:
    """One row in a page on either side."""
    sides = [(address_of(pool), ROW_NBYTES, ROW_NBYTES) for pool in (device, host)]
    return native.PLAN.pack(*sides[0], *sides[1], ROW_NBYTES, 1)


def copy(device_pages: list[int], host_pages: list[int], *, cut: int = 0) -> bytes:
    """Copies to a host pool of three pages from a device pool of two; the host's bytes then."""
    device, host = bytearray(b"d" * 2 * ROW_NBYTES), bytearray(b"h" * 3 * ROW_NBYTES)
    plan = plan_of(device, host)
    ids = array("i", device_pages), 2, array("i", host_pages), 3
    try:
        _transfer.copy_rows(plan[: len(plan) - cut], *ids, True)
    finally:
        assert device == b"d" * 2 * ROW_NBYTES
        if device_pages != [1]:
            assert host == b"h" * 3 * ROW_NBYTES
    return bytes(host)


def test_it_copies_the_named_row() -> None:
    assert copy([1], [2]) == b"h" * 2 * ROW_NBYTES + b"d" * ROW_NBYTES


@pytest.mark.parametrize(
    ("device_pages", "host_pages"),
    [([2], [0]), ([-1], [0]), ([0], [3]), ([0], [-1]), ([0, 1], [0])],
)
def test_pages_that_are_not_pairs_of_pages_move_nothing(
    device_pages: list[int], host_pages: list[int]
) -> None:
    with pytest.raises(ValueError, match="not pairs of pages"):
        copy(device_pages, host_pages)


def test_a_plan_that_is_cut_short_moves_nothing() -> None:
    with pytest.raises(ValueError, match="not pairs of pages"):
        copy([0], [0], cut=8)
