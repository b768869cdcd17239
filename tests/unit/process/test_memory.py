"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from hicache_core.process.memory import give_back

BLOCK_NBYTES = 100_000  # small enough for the heap, whose middle the C library keeps


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps nothing")
def test_free_memory_between_blocks_in_use_is_given_back() -> None:
    blocks = [bytearray(BLOCK_NBYTES) for _ in range(1000)]
    kept = bytearray(BLOCK_NBYTES)
    blocks.clear()
    before = resident_nbytes()
    give_back()
    assert before - resident_nbytes() > 500 * BLOCK_NBYTES
    assert len(kept) == BLOCK_NBYTES
