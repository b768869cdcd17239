"""The pure Python twin of the native page keys: same functions, same answers."""

from __future__ import annotations

from array import array
from hashlib import sha256
from sys import byteorder

_TOKEN_NBYTES = 4


def page_digests(tokens: bytes, page_size: int, parent: bytes) -> bytes:
    """Digests of the whole pages of a prompt: ``SHA-256(previous digest || tokens of the page)``.

    The formula is that of docs/key-spec.md.

    Args:
        tokens: packed token ids, four bytes each, little endian.
        page_size: tokens in a page.
        parent: digest before the first page, 32 bytes, or empty.

    Returns:
        32 bytes for each page, packed.
    """
    page_nbytes = page_size * _TOKEN_NBYTES
    digests: list[bytes] = []
    append = digests.append
    for start in range(0, len(tokens) - page_nbytes + 1, page_nbytes):
        parent = sha256(parent + tokens[start : start + page_nbytes]).digest()
        append(parent)
    return b"".join(digests)


def pack_ids(ids: list[int] | tuple[int, ...]) -> bytes:
    """Pack a list or tuple of token ids as little-endian u32; TypeError or OverflowError if bad."""
    if bool in set(map(type, ids)):
        raise TypeError("expected a token id, got a bool")
    packed = array("I", ids)
    if byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def implementation() -> str:
    """Name of what computes the digests."""
    return "pure-python"
