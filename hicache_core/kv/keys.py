"""Page keys: from token ids to the names of stored pages. ``docs/key-spec.md`` is the contract.

Token ids travel *packed*: little-endian u32, four bytes a token. The digest of a page chains the
digest of the page before it, so one digest names a whole prefix.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from sys import byteorder
from typing import NoReturn, Protocol, SupportsIndex, TypeAlias, cast, overload

from hicache_core.errors import InvalidTokens, SpecError
from hicache_core.types import Namespace

try:
    if os.environ.get("HICACHE_PURE_PYTHON") == "1":
        raise ImportError("HICACHE_PURE_PYTHON=1")
    from hicache_core.kv._page_keys import implementation, pack_ids
    from hicache_core.kv._page_keys import page_digests as _page_digests
except ImportError:  # also if there was no C compiler: the twin answers the same, more slowly
    from hicache_core.kv._page_keys_py import implementation, pack_ids
    from hicache_core.kv._page_keys_py import page_digests as _page_digests

TOKEN_NBYTES = 4
DIGEST_NBYTES = 32
FORMAT_VERSION = 1
_MAX_ID = 2**32 - 1
_NAMESPACE_TAG = b"sglang-cache-namespace-v1"

# Typecodes of native signed and unsigned integers, as the buffer protocol names them.
_SIGNED = frozenset("bhilqn")
_UNSIGNED = frozenset("BHILQN")


class _Tensor(Protocol):
    """What we use of a torch tensor, so that torch need not be imported."""

    def detach(self) -> _Tensor: ...
    def cpu(self) -> _Tensor: ...
    def numpy(self) -> object: ...


TokenIds: TypeAlias = bytes | bytearray | memoryview | Sequence[int] | _Tensor | object
"""Packed bytes, a sequence of ints, or a 1-d integer array (array, numpy) or torch tensor."""


IMPLEMENTATION = implementation()
"""What computes the digests here: ``x86-sha``, ``portable`` (both native) or ``pure-python``."""


def pack_tokens(ids: TokenIds) -> bytes:
    """Pack token ids as little-endian u32.

    Args:
        ids: packed bytes (returned as they are), a sequence of ints, or a 1-d integer array.
            A torch tensor on a device is copied to the CPU, which waits for that device.

    Returns:
        Four bytes a token.

    Raises:
        InvalidTokens: an id is negative, above 2**32 - 1 or not an integer, or packed bytes are
            not a whole number of tokens.
    """
    if isinstance(ids, bytes | bytearray | memoryview):
        return _checked(bytes(ids))
    if isinstance(ids, list | tuple):
        return _pack_sequence(ids)
    if isinstance(ids, str):
        raise InvalidTokens("token ids are a str; encode the text with the tokenizer first")
    if hasattr(ids, "detach") and hasattr(ids, "numpy"):
        ids = cast(_Tensor, ids).detach().cpu().numpy()
    try:
        view = memoryview(ids)  # type: ignore[arg-type]  # raises TypeError if it is not a buffer
    except TypeError:
        if isinstance(ids, Sequence):
            return _pack_sequence(list(ids))
        raise InvalidTokens(
            f"token ids are a {type(ids).__name__}; give packed bytes, a sequence of ints, "
            "or a 1-d integer array"
        ) from None
    return _pack_buffer(view)


def _checked(tokens: bytes) -> bytes:
    if len(tokens) % TOKEN_NBYTES:
        raise InvalidTokens(
            f"packed token ids are {len(tokens)} bytes, not a multiple of {TOKEN_NBYTES}; "
            "pack them with pack_tokens()"
        )
    return tokens


def _pack_sequence(ids: list[int] | tuple[int, ...]) -> bytes:
    try:
        return pack_ids(ids)
    except (TypeError, OverflowError):
        _explain(ids)


def _explain(ids: Sequence[object]) -> NoReturn:
    """Name the first bad id of a sequence that could not be packed."""
    for i, item in enumerate(ids):
        if isinstance(item, bool) or not isinstance(item, SupportsIndex):
            raise InvalidTokens(f"token {i} is {item!r}, a {type(item).__name__}; give integers")
        if not 0 <= item.__index__() <= _MAX_ID:
            raise InvalidTokens(f"token {i} is {item!r}; token ids go from 0 to {_MAX_ID}")
    raise InvalidTokens("token ids changed while they were read")


def _pack_buffer(view: memoryview) -> bytes:
    """Pack a typed integer array without a Python object for each token."""
    kind = view.format
    if view.ndim != 1 or not (kind in _SIGNED or kind in _UNSIGNED):
        raise InvalidTokens(
            f"token ids are a {view.ndim}-d array of format {kind!r}; "
            "give a 1-d array of native integers"
        )
    if view.itemsize not in (4, 8):
        return _pack_sequence(view.tolist())
    packed = view.tobytes()
    if view.itemsize == 8:
        words = array("I", packed)
        high = words[1::2] if byteorder == "little" else words[::2]
        if high.tobytes().strip(b"\0"):
            _explain(view.tolist())
        packed = (words[::2] if byteorder == "little" else words[1::2]).tobytes()
    if byteorder == "big":
        words = array("I", packed)
        words.byteswap()
        packed = words.tobytes()
    # A negative int32 has its top bit set: the last byte of its token is not ASCII.
    if kind in _SIGNED and view.itemsize == 4 and not packed[3::4].isascii():
        _explain(view.tolist())
    return packed


def chain_seed(namespace: Namespace) -> bytes:
    """The seed of the chain of page digests of a namespace (formula: docs/key-spec.md).

    Returns:
        ``b""`` for the default namespace, otherwise 32 bytes. Byte-compatible with SGLang for
        ``extra_key`` and ``cache_salt``; ``lora_id`` follows as a third field if it is set, and
        ``variant`` as a fourth.
    """
    fields = [namespace.extra_key, namespace.cache_salt]
    if namespace.lora_id is not None or namespace.variant is not None:
        fields.append(namespace.lora_id)
    if namespace.variant is not None:
        fields.append(namespace.variant)
    if fields == [None, None]:
        return b""
    seed = sha256(_NAMESPACE_TAG)
    for field in fields:
        if field is None:
            seed.update(b"\0")
        else:
            text = field.encode()
            seed.update(b"\1" + len(text).to_bytes(8, "little") + text)
    return seed.digest()


def page_digests(tokens: bytes, page_size: int, parent: bytes = b"") -> bytes:
    """Chained digests of the whole pages of ``tokens``.

    Args:
        tokens: packed token ids; a tail shorter than a page is left out.
        page_size: tokens in a page.
        parent: digest of the page before, the chain's seed, or empty.

    Returns:
        32 bytes for each page, packed: SHA-256 over the previous digest and the page's tokens.

    Raises:
        InvalidTokens: ``tokens`` is not a whole number of tokens.
        SpecError: ``page_size`` is below 1, or ``parent`` is not a digest.
    """
    if page_size < 1:
        raise SpecError(f"page_size is {page_size}; it is at least 1 token")
    if len(parent) not in (0, DIGEST_NBYTES):
        raise SpecError(
            f"the parent digest is {len(parent)} bytes; give {DIGEST_NBYTES}, or none at all"
        )
    return _page_digests(_checked(tokens), page_size, parent)


def object_keys(storage_namespace: str, digests: bytes) -> list[str]:
    """The keys of stored pages, one for each digest: ``<storage namespace>/<hex digest>``."""
    prefix = storage_namespace + "/"
    text = digests.hex()
    step = 2 * DIGEST_NBYTES
    return [prefix + text[i : i + step] for i in range(0, len(text), step)]


class PageKeys(Sequence[str]):
    """The keys of consecutive pages, hashed by the first thread that looks at one.

    So the scheduler gives a job its keys at no cost, and a storage thread computes them, without
    Python's lock if the native module is built. A slice shares the computed digests.
    """

    def __init__(
        self,
        storage_namespace: str,
        tokens: bytes | memoryview,
        page_size: int,
        parent: bytes = b"",
    ) -> None:
        """Hashes nothing yet.

        Args:
            storage_namespace: prefix of every key.
            tokens: packed token ids of the pages; a view must be of immutable bytes.
            page_size: tokens in a page.
            parent: digest of the page before the first, or the chain's seed.
        """
        n_pages = len(tokens) // (page_size * TOKEN_NBYTES)
        self._chain = _Chain(storage_namespace, tokens, page_size, parent)
        self._range = range(n_pages)

    @property
    def digests(self) -> bytes:
        """32 bytes for each page, packed; computed at the first call."""
        first, last = self._range.start, self._range.stop
        return self._chain.digests()[first * DIGEST_NBYTES : last * DIGEST_NBYTES]

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PageKeys: ...
    def __getitem__(self, index: int | slice) -> str | PageKeys:
        if isinstance(index, slice):
            part = PageKeys.__new__(PageKeys)
            part._chain, part._range = self._chain, self._range[index]
            if part._range.step != 1:
                raise ValueError("keys of consecutive pages are sliced without a step")
            return part
        page = self._range[index]
        return object_keys(self._chain.storage_namespace, self._chain.digest(page))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(object_keys(self._chain.storage_namespace, self.digests))


class JoinedKeys(Sequence[str]):
    """Several sequences of keys, one after the other; each is looked at when it is used."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        """Looks at nothing yet.

        Args:
            parts: the sequences, in order.
        """
        self._parts = parts
        self._n_keys = sum(map(len, parts))

    def __len__(self) -> int:
        return self._n_keys

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return list(self)[index]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)


class _Chain:
    """Digests of a run of pages, computed once; two threads at once compute the same."""

    def __init__(
        self, storage_namespace: str, tokens: bytes | memoryview, page_size: int, parent: bytes
    ) -> None:
        self.storage_namespace = storage_namespace
        self._tokens = tokens
        self._page_size = page_size
        self._parent = parent
        self._digests: bytes | None = None

    def digests(self) -> bytes:
        if self._digests is None:
            self._digests = page_digests(bytes(self._tokens), self._page_size, self._parent)
        return self._digests

    def digest(self, page: int) -> bytes:
        return self.digests()[page * DIGEST_NBYTES : (page + 1) * DIGEST_NBYTES]


def describe_namespace(identity: Mapping[str, object], page_size: int, layout: str) -> str:
    """Everything that must match for two objects to be interchangeable, as canonical JSON.

    Args:
        identity: what a page holds (``KVSpec.identity()``): JSON values only.
        page_size: tokens in a page.
        layout: name of the host layout, which orders the bytes in an object.
    """
    described = {
        "format": FORMAT_VERSION,
        "identity": identity,
        "layout": layout,
        "page_size": page_size,
    }
    return json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)


def storage_namespace(identity: Mapping[str, object], page_size: int, layout: str) -> str:
    """The digest of ``describe_namespace``: the first part of every key.

    Args:
        identity: ``KVSpec.identity()`` of what an object holds.
        page_size: tokens in a page.
        layout: name of the host layout, which orders the bytes.

    Returns:
        16 hex characters: the first 8 bytes of SHA-256 over the canonical JSON.
    """
    return namespace_digest(describe_namespace(identity, page_size, layout))


def namespace_digest(described: str) -> str:
    """The storage namespace of a text from ``describe_namespace``."""
    return sha256(described.encode()).hexdigest()[:16]
