"""Why a prompt is not in a store: which leading pages are present, and why the next one is a miss.

Only reads: a damaged object is reported and stays where it is.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from hicache_core.kv.keys import (
    DIGEST_NBYTES,
    TOKEN_NBYTES,
    chain_seed,
    object_keys,
    page_digests,
)
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.manifest import Manifest
from hicache_core.storage.sealed import HEADER_NBYTES, mismatch
from hicache_core.types import Namespace


class Cause(enum.StrEnum):
    """Why a page is a miss."""

    CORRUPT = "corrupt"  # present, but damaged
    WRONG_VERSION = "wrong_version"  # sealed by another version of HiCache
    WRONG_LENGTH = "wrong_length"  # not as long as its header says
    FOREIGN = "foreign"  # sealed for another key
    OTHER_REQUEST_NAMESPACE = "other_request_namespace"  # stored with another salt, key or adapter
    OTHER_STORAGE_NAMESPACE = "other_storage_namespace"  # stored by a cache with other settings
    GONE = "gone"  # later pages are stored: it was removed, or its write failed
    NEVER_STORED = "never_stored"  # neither this page nor a later one: not stored, or removed since


@dataclass(frozen=True, slots=True)
class AskedGroup:
    """A group of layers of the cache that missed: a window, or a state.

    Attributes:
        name: of the group.
        storage_namespace: of its units.
        window: tokens of a window; 0 for a state.
    """

    name: str
    storage_namespace: str
    window: int

    def first_needed(self, n_pages: int, page_size: int) -> int:
        """As ``kv.spec.Group.first_needed``, with the arguments ``n_pages`` and ``page_size``."""
        if not self.window:
            return max(0, n_pages - 1)
        return max(0, n_pages * page_size - self.window + 1) // page_size


@dataclass(frozen=True, slots=True)
class Question:
    """The prompt that was a miss, and where it was looked up.

    Attributes:
        tokens: packed token ids of the prompt.
        page_size: tokens in a page.
        storage_namespace: of the cache that missed.
        request: salt, key and adapter of the request that missed.
        manifest: of ``storage_namespace``; None if unknown.
        others: further storage namespaces in the store, with their manifests if known.
        groups: the groups of layers of the cache.
        has_full_pages: whether the cache stores full pages, beside the units of its groups.
    """

    tokens: bytes
    page_size: int
    storage_namespace: str
    request: Namespace = field(default_factory=Namespace)
    manifest: Manifest | None = None
    others: Mapping[str, Manifest | None] = field(default_factory=dict)
    groups: tuple[AskedGroup, ...] = ()
    has_full_pages: bool = True


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which the cache that stored a page differs from the one that asks."""

    name: str
    asked: object
    stored: object


@dataclass(frozen=True, slots=True)
class Miss:
    """The first page that is not a hit.

    Attributes:
        page: its index in the prompt, from 0.
        key: its key.
        cause: why it is a miss.
        found_at: the key under which the page was found, or for which the object under ``key`` was
            sealed; empty if there is none.
        request: the request namespace in which it was found, if that is the cause.
        differences: the fields in which the other storage namespace differs; empty if that is not
            the cause, or if a manifest is missing.
    """

    page: int
    key: str
    cause: Cause
    found_at: str = ""
    request: Namespace | None = None
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupAnswer:
    """What a store has of one group.

    Attributes:
        group: the group.
        n_units: units that are present, anywhere in the prompt.
        missing: pages whose unit one needs after all stored full pages, and that is absent or
            damaged; by index.
    """

    group: AskedGroup
    n_units: int
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a store has of a prompt.

    Attributes:
        question: what was asked.
        n_pages: full pages of the prompt.
        n_stored: leading pages that are present and intact.
        n_present: pages that are present, anywhere in the prompt.
        miss: the first page that is not a hit; None if all are.
        n_usable: leading pages after which one can go on: as ``n_stored``, or fewer, if a group
            lacks units.
        cut_by: the group that makes them fewer; empty if none does.
        groups: what the store has of each group.
    """

    question: Question
    n_pages: int
    n_stored: int
    n_present: int
    miss: Miss | None
    n_usable: int
    cut_by: str = ""
    groups: tuple[GroupAnswer, ...] = ()


def why(backend: StorageBackend, question: Question) -> Answer:
    """Looks up a prompt and finds the cause of its first miss.

    Reads every leading page completely, to check its seal.

    Args:
        backend: open, and not sealed.
        question: the prompt, and where it was looked up.

    Raises:
        InvalidTokens: the tokens are not packed token ids.
        SpecError: the page size is not valid.
        BackendError: the store cannot answer.
    """
    keys = _keys(question, question.storage_namespace, question.request, question.page_size)
    n_pages, miss = len(keys), None
    n_stored = n_present = n_pages
    if question.has_full_pages:
        n_stored, wrong = _leading(backend, keys)
        n_present = n_stored + sum(backend.exists(key) for key in keys[n_stored:])
        if n_stored < n_pages and wrong is not None:
            miss = Miss(n_stored, keys[n_stored], *wrong)
        elif n_stored < n_pages:
            behind = n_present > n_stored
            miss = _elsewhere(backend, question, n_stored, keys[n_stored], behind=behind)
    units = [_Units(backend, question, group) for group in question.groups]
    n_usable, cut_by = _usable(units, n_stored)
    groups = tuple(one.answer(n_stored) for one in units)
    return Answer(question, n_pages, n_stored, n_present, miss, n_usable, cut_by, groups)


def _leading(backend: StorageBackend, keys: Sequence[str]) -> tuple[int, tuple[Cause, str] | None]:
    """How many leading objects are intact, and what is wrong with the next; None if absent."""
    for n, key in enumerate(keys):
        value = backend.get(key)
        wrong = None if value is None else _wrong_with(key, value)
        if value is None or wrong is not None:
            return n, wrong
    return len(keys), None


class _Units:
    """The units of one group for a prompt. Those that a boundary needs are read, to be sure."""

    def __init__(self, backend: StorageBackend, question: Question, group: AskedGroup) -> None:
        self.group = group
        self._backend = backend
        self._page_size = question.page_size
        namespace = group.storage_namespace
        self._keys = _keys(question, namespace, question.request, question.page_size)
        self._there = [backend.exists(key) for key in self._keys]
        self._intact: dict[int, bool] = {}

    def missing(self, n_pages: int) -> Iterator[int]:
        """The pages whose unit one needs to go on after ``n_pages``, and that cannot be used."""
        for page in range(self.group.first_needed(n_pages, self._page_size), n_pages):
            if not self._is_intact(page):
                yield page

    def answer(self, n_pages: int) -> GroupAnswer:
        return GroupAnswer(self.group, sum(self._there), tuple(self.missing(n_pages)))

    def _is_intact(self, page: int) -> bool:
        if page not in self._intact:
            key = self._keys[page]
            value = self._backend.get(key) if self._there[page] else None
            self._intact[page] = value is not None and _wrong_with(key, value) is None
        return self._intact[page]


def _usable(units: Sequence[_Units], n_stored: int) -> tuple[int, str]:
    """The pages after which one can go on, and the group that makes them fewer than stored."""
    cut_by = ""
    for n_pages in range(n_stored, 0, -1):
        lacking = [one for one in units if next(one.missing(n_pages), None) is not None]
        if not lacking:
            return n_pages, cut_by
        cut_by = cut_by or lacking[0].group.name
    return 0, cut_by


def _keys(question: Question, namespace: str, request: Namespace, page_size: int) -> list[str]:
    n_pages = len(question.tokens) // (page_size * TOKEN_NBYTES)
    tokens = question.tokens[: n_pages * page_size * TOKEN_NBYTES]
    return object_keys(namespace, page_digests(tokens, page_size, chain_seed(request)))


def _wrong_with(key: str, value: bytes | bytearray | memoryview) -> tuple[Cause, str] | None:
    """Returns what is wrong with an object, and the key in its header; None if intact."""
    data = memoryview(value).cast("B")
    if data.nbytes < HEADER_NBYTES:
        return Cause.WRONG_LENGTH, ""
    header = data[:HEADER_NBYTES]
    kind = mismatch(key, (header, data[HEADER_NBYTES:]))
    if kind is None:
        return None
    # | magic … checksum, 24 or 32 bytes | namespace, 8 bytes | page hash, 32 bytes |
    names = bytes(header[-DIGEST_NBYTES - 8 :])
    found_at = f"{names[:8].hex()}/{names[8:].hex()}" if kind == Cause.FOREIGN else ""
    return Cause(kind), found_at


def _elsewhere(
    backend: StorageBackend, question: Question, page: int, key: str, *, behind: bool
) -> Miss:
    """Finds out why there is no object under the key of a page, and where else the page is."""
    if behind:
        return Miss(page, key, Cause.GONE)
    at = page * question.page_size
    own = {question.storage_namespace: question.manifest}
    for namespace, manifest in {**own, **question.others}.items():
        for request in _requests(question.request):
            if namespace == question.storage_namespace and request == question.request:
                continue
            found_at = _key_at(question, namespace, manifest, request, at)
            if found_at is None or not backend.exists(found_at):
                continue
            other = None if request == question.request else request
            if namespace == question.storage_namespace:
                return Miss(page, key, Cause.OTHER_REQUEST_NAMESPACE, found_at, other)
            cause = Cause.OTHER_STORAGE_NAMESPACE
            differences = tuple(_differences(question.manifest, manifest))
            return Miss(page, key, cause, found_at, other, differences)
    return Miss(page, key, Cause.NEVER_STORED)


def _key_at(
    question: Question, namespace: str, manifest: Manifest | None, request: Namespace, at: int
) -> str | None:
    """Returns the key of the page with token ``at`` in a namespace; None if it is not full."""
    page_size = question.page_size if manifest is None else manifest.page_size
    keys = _keys(question, namespace, request, page_size)
    return keys[at // page_size] if at // page_size < len(keys) else None


def _requests(given: Namespace) -> Iterator[Namespace]:
    """Yields the request namespace as given, and then without one or more of its fields."""
    names = [name for name in ("extra_key", "cache_salt", "lora_id") if getattr(given, name)]
    for n in range(len(names) + 1):
        for left_out in combinations(names, n):
            yield replace(given, **dict.fromkeys(left_out))


def _differences(asked: Manifest | None, stored: Manifest | None) -> Iterator[Difference]:
    if asked is None or stored is None:
        return
    left, right = asked.fields, stored.fields
    for name in sorted(left.keys() | right.keys()):
        if left.get(name) != right.get(name):
            yield Difference(name, left.get(name), right.get(name))
