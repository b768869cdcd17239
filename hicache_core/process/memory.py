"""Memory that was freed, but not given back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress


def give_back() -> None:
    """Gives free memory back to the system, as far as the C library can.

    To be called after work that takes much memory once, such as converting a model: the C library
    keeps what was freed between blocks that are still in use. Any thread; it takes some tens of
    milliseconds.
    """
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library other than glibc has none
            ctypes.CDLL(None).malloc_trim(0)
