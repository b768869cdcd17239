"""Addresses of pages against a dumb model; stretches of a batch."""

from __future__ import annotations

import ctypes
import threading

import pytest
from hicache_mooncake.memory import Batch, RegisteredMemory, SliceGate, address_of, runs
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import IntegrityError


def test_the_address_is_that_of_the_first_byte() -> None:
    memory = bytearray(b"0123456789")
    assert ctypes.string_at(address_of(memoryview(memory)[3:]), 4) == b"3456"


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50), st.integers(1, 9))),
    st.integers(1, 60),
    st.integers(1, 12),
)
def test_runs_cover_the_batch_in_order_within_the_limits_and_name_no_key_twice(
    pages: list[tuple[int, int, int]], max_nbytes: int, max_slices: int
) -> None:
    keys = [f"key {n}" for n, _, _ in pages]
    sizes, counts = [size for _, size, _ in pages], [count for _, _, count in pages]
    stretches = list(runs(Batch(keys, sizes, counts), max_nbytes, max_slices))
    covered = [n for run in stretches for n in range(run.start, run.stop)]
    assert covered == list(range(len(pages)))
    for run in stretches:
        assert run.stop > run.start
        assert len(set(keys[run])) == run.stop - run.start
        within = sum(sizes[run]) <= max_nbytes and sum(counts[run]) <= max_slices
        assert within or run.stop - run.start == 1


def test_the_gate_keeps_the_slices_under_way_within_its_limit() -> None:
    gate = SliceGate(10)
    lock = threading.Lock()
    under_way: list[int] = []
    seen: list[tuple[int, int]] = []

    def work(n_slices: int) -> None:
        for _ in range(50):
            with gate.passing(n_slices):
                with lock:
                    under_way.append(n_slices)
                    seen.append((sum(under_way), len(under_way)))
                with lock:
                    under_way.remove(n_slices)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 3, 4, 7, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 250
    assert all(total <= 10 or n_calls == 1 for total, n_calls in seen)


@given(
    st.lists(st.tuples(st.integers(0, 250), st.integers(0, 40)), max_size=8),
    st.sets(st.integers(0, 4), min_size=1),
)
def test_slices_are_the_bytes_of_the_page_or_none_outside(
    cuts: list[tuple[int, int]], registered: set[int]
) -> None:
    """Five neighbouring blocks of 60 bytes, some registered; segments anywhere in them."""
    memory = memoryview(bytearray(range(256)) + bytearray(44))
    blocks = RegisteredMemory()
    for block in registered:
        blocks.add(memory[block * 60 : block * 60 + 60])
    page = [memory[start : start + size] for start, size in cuts]

    inside = all(
        not segment.nbytes
        or (start // 60 in registered and (start + segment.nbytes - 1) // 60 == start // 60)
        for (start, _), segment in zip(cuts, page, strict=True)
    )
    slices = blocks.slices(page)
    assert (slices is not None) == inside
    if slices is not None:
        stored = [
            ctypes.string_at(address, size)
            for address, size in zip(slices.addresses, slices.sizes, strict=True)
        ]
        assert b"".join(stored) == b"".join(page)
        assert slices.nbytes == sum(slices.sizes)


def test_read_only_memory_is_never_taken_in_place() -> None:
    memory = bytearray(16)
    blocks = RegisteredMemory()
    blocks.add(memoryview(memory))
    assert blocks.slices([memoryview(memory)]) is not None
    assert blocks.slices([memoryview(memory).toreadonly()]) is None


def test_ranges_that_overlap_are_an_error_and_neighbours_are_not() -> None:
    memory = memoryview(bytearray(64))
    blocks = RegisteredMemory()
    blocks.add(memory[16:32])
    blocks.add(memory[32:48])
    blocks.add(memory[:16])
    for start, stop in [(8, 17), (47, 60), (20, 24), (0, 64)]:
        with pytest.raises(IntegrityError, match="overlaps"):
            blocks.check_apart(memory[start:stop])
    blocks.check_apart(memory[48:64])
    assert blocks.nbytes == 48
