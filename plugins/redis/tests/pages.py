"""Keys and pages for tests: the bytes of a page are a function of its key."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from hicache_core.types import Page

NAMESPACE = "0123456789abcdef"


def keys_of(n_keys: int, label: str) -> list[str]:
    """Page keys that no other label has."""
    return [
        f"{NAMESPACE}/{hashlib.sha256(f'{label} {n}'.encode()).hexdigest()}" for n in range(n_keys)
    ]


def content(key: str, nbytes: int) -> bytes:
    """The object under ``key``."""
    return random.Random(key).randbytes(nbytes)


def blank(shape: Sequence[int]) -> Page:
    """A page with segments of these lengths."""
    return tuple(memoryview(bytearray(nbytes)) for nbytes in shape)


def filled(key: str, shape: Sequence[int]) -> Page:
    """The object of ``key`` as a page."""
    page, value, start = blank(shape), content(key, sum(shape)), 0
    for segment in page:
        segment[:] = value[start : start + segment.nbytes]
        start += segment.nbytes
    return page


def holds(key: str, page: Page) -> bool:
    """Whether the page holds the object of ``key``."""
    value = b"".join(page)
    return value == content(key, len(value))
