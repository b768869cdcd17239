"""Keys, pages and what is in them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from hicache_core.storage.base import StorageBackend
from hicache_core.types import Page

NAMESPACE = "0123456789abcdef"
PAGE = (64, 4032)
NBYTES = 4096


def keys_of(n_keys: int, label: str = "", namespace: str = NAMESPACE) -> list[str]:
    """Page keys, the same ones for the same label."""
    texts = (f"{label} {n}".encode() for n in range(n_keys))
    return [f"{namespace}/{hashlib.sha256(text).hexdigest()}" for text in texts]


def content(key: str, nbytes: int) -> bytes:
    """The one right object of this length under ``key``."""
    return random.Random(f"{key} {nbytes}").randbytes(nbytes)


def blank(shape: Sequence[int]) -> Page:
    """A page with segments of these lengths."""
    return tuple(memoryview(bytearray(b"\xee" * nbytes)) for nbytes in shape)


def filled(key: str, shape: Sequence[int]) -> Page:
    """The page of ``key``."""
    data = memoryview(bytearray(content(key, sum(shape))))
    starts = [sum(shape[:n]) for n in range(len(shape))]
    return tuple(data[start : start + nbytes] for start, nbytes in zip(starts, shape, strict=True))


def is_right(key: str, page: Page) -> bool:
    """Whether ``page`` holds what belongs to ``key``."""
    found = b"".join(page)
    return found == content(key, len(found))


def put(backend: StorageBackend, keys: Sequence[str], shape: Sequence[int] = PAGE) -> None:
    """Stores the pages of ``keys`` as one batch."""
    assert backend.batch_set(keys, [filled(key, shape) for key in keys]) == len(keys)


def hits(backend: StorageBackend, keys: Sequence[str], shape: Sequence[int] = PAGE) -> int:
    """How many leading pages come back; each of them must be right."""
    pages = [blank(shape) for _ in keys]
    n_filled = backend.batch_get(keys, pages)
    assert all(is_right(key, page) for key, page in zip(keys[:n_filled], pages, strict=False))
    return n_filled
