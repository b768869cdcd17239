"""The memory that a server takes for a string, as jemalloc hands it out."""

from __future__ import annotations

_QUANTUM_NBYTES = 16
_SMALL_NBYTES = 128
_PER_DOUBLING = 4
_HEADER_NBYTES = 10
"""What a server has of a long string beside its bytes: their number, twice, a type, a zero."""


def size_class(nbytes: int) -> int:
    """Returns the bytes that jemalloc hands out for ``nbytes``: four sizes in each doubling."""
    if nbytes <= _SMALL_NBYTES:
        return -(-nbytes // _QUANTUM_NBYTES) * _QUANTUM_NBYTES
    below = 1 << ((nbytes - 1).bit_length() - 1)  # the last power of two before it
    step = below // _PER_DOUBLING
    return -(-nbytes // step) * step


def string_nbytes(nbytes: int) -> int:
    """Returns the memory of a string of ``nbytes``, without that of its key."""
    return size_class(nbytes + _HEADER_NBYTES)
