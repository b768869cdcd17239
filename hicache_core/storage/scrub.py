"""Scrubbing: reads every stored page, checks its seal and deletes what is damaged.

An object without a seal may belong to another tool, or be a page in a format of its backend. It is
reported and stays, unless the caller says otherwise.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hicache_core.errors import BackendError
from hicache_core.storage.base import (
    Buffer,
    Listable,
    RegistersMemory,
    StorageBackend,
    namespace_of,
)
from hicache_core.storage.sealed import HEADER_NBYTES, MAGIC, is_page_key, mismatch

GOOD, VANISHED = "good", "vanished"
UNKNOWN = "unknown"
REMOVED = frozenset(["corrupt", "foreign", "wrong_length"])
"""Deleted by default. ``wrong_version`` stays: another version of HiCache may read it."""
KINDS = (GOOD, "corrupt", "foreign", "wrong_length", "wrong_version", UNKNOWN, VANISHED)

DEFAULT_BATCH_NBYTES = 64 << 20
_BATCH_KEYS = 1024


@dataclass(frozen=True, slots=True)
class ScrubResult:
    """The result for one key.

    Attributes:
        key: as the backend lists it.
        kind: one of ``KINDS``. ``foreign``: sealed for another key. ``unknown``: not a page key, or
            without the header of a page. ``vanished``: listed, but gone when it was read.
        nbytes: length of the object; 0 if it has vanished.
        removed: whether it was deleted.
    """

    key: str
    kind: str
    nbytes: int
    removed: bool = False


@dataclass
class ScrubTotals:
    """Totals of what was checked, by namespace and kind.

    Attributes:
        objects: number of objects.
        nbytes: their bytes.
        n_removed: number of objects that were deleted.
        removed_kinds: the kinds to delete.
    """

    objects: Counter[tuple[str, str]] = field(default_factory=Counter)
    nbytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    n_removed: int = 0
    removed_kinds: frozenset[str] = REMOVED

    def add(self, checked: ScrubResult) -> None:
        """Adds one result. Keys that are not page keys count under an empty namespace."""
        where = (namespace_of(checked.key) if is_page_key(checked.key) else "", checked.kind)
        self.objects[where] += 1
        self.nbytes[where] += checked.nbytes
        self.n_removed += checked.removed

    @property
    def n_bad(self) -> int:
        """Number of objects of the kinds to delete."""
        return sum(n for (_, kind), n in self.objects.items() if kind in self.removed_kinds)

    def by_namespace(self) -> dict[str, dict[str, Mapping[str, int]]]:
        """Returns namespace -> kind -> ``objects`` and ``nbytes``, sorted by name."""
        told: dict[str, dict[str, Mapping[str, int]]] = {}
        for namespace, kind in sorted(self.objects):
            where = (namespace, kind)
            sums = {"objects": self.objects[where], "nbytes": self.nbytes[where]}
            told.setdefault(namespace, {})[kind] = sums
        return told


def scrub(
    backend: StorageBackend,
    *,
    prefix: str = "",
    remove: bool = True,
    kinds: frozenset[str] = REMOVED,
    limit: int | None = None,
    batch_nbytes: int = DEFAULT_BATCH_NBYTES,
) -> Iterator[ScrubResult]:
    """Reads every object that ``backend`` lists, checks its seal and deletes what is damaged.

    A bad object is read a second time right before it is deleted. So one that was overwritten
    meanwhile stays, and so does one whose two reads differ: its bytes were damaged on the way.
    Stores offer no lock between that read and the deletion. A good object stored in that moment is
    deleted too, which costs its next reader a miss.

    Args:
        backend: open, and not sealed: the stored bytes must be visible.
        prefix: only keys that start with it.
        remove: False deletes nothing.
        kinds: the kinds to delete; ``REMOVED | {UNKNOWN}`` includes objects without a page header.
        limit: maximum number of keys.
        batch_nbytes: maximum number of bytes in memory, unless one object is larger.

    Returns:
        An iterator that reads the objects and yields one ``ScrubResult`` for each key.

    Raises:
        BackendError: the backend cannot list its keys, or cannot delete although ``remove``. The
            iterator raises it when the store fails.
    """
    listable = backend.capability(Listable)
    if listable is None:
        raise BackendError(
            f"backend {backend.name!r} cannot list its keys (it is not Listable), so its objects "
            "cannot be scrubbed; each page is still checked whenever it is read"
        )
    if remove:
        try:
            backend.delete([])
        except NotImplementedError as exc:
            raise BackendError(f"{exc}; use --dry-run to check without deleting") from exc
    keys = itertools.islice(listable.list_keys(prefix), limit)
    return _scrubbed(backend, keys, batch_nbytes, kinds if remove else frozenset())


def classify(key: str, value: Buffer | None) -> str:
    """Returns which of ``KINDS`` the object under ``key`` is; ``value`` is None if it is gone."""
    if value is None:
        return VANISHED
    data = memoryview(value).cast("B")
    if not is_page_key(key) or data[: len(MAGIC)] != MAGIC:
        return UNKNOWN
    if data.nbytes < HEADER_NBYTES:
        return "wrong_length"
    return mismatch(key, (data[:HEADER_NBYTES], data[HEADER_NBYTES:])) or GOOD


def _scrubbed(
    backend: StorageBackend, keys: Iterator[str], batch_nbytes: int, kinds: frozenset[str]
) -> Iterator[ScrubResult]:
    while batch := list(itertools.islice(keys, _BATCH_KEYS)):
        for key, value in _read(backend, batch, batch_nbytes):
            checked = ScrubResult(key, classify(key, value), _nbytes(value))
            if checked.kind not in (GOOD, VANISHED):
                checked = _reread(backend, key, value, kinds)
            yield checked


def _reread(
    backend: StorageBackend, key: str, before: Buffer | None, kinds: frozenset[str]
) -> ScrubResult:
    """Reads and judges again; deletes the object if both reads are equal and of ``kinds``."""
    value = backend.get(key)
    kind = classify(key, value)
    removed = kind in kinds and value == before
    if removed:
        backend.delete([key])
    return ScrubResult(key, kind, _nbytes(value), removed)


def _read(
    backend: StorageBackend, keys: Sequence[str], batch_nbytes: int
) -> Iterator[tuple[str, Buffer | None]]:
    """Reads the objects under ``keys``, in batches while they have the same length.

    ``get`` tells the length of one object; the next ones mostly have the same. A batch is twice as
    large as the last one that was read completely.
    """
    batches = backend.capability(RegistersMemory) is None  # else it fills registered memory only
    nbytes = n_ahead = start = 0
    while start < len(keys):
        n = min(n_ahead, batch_nbytes // max(nbytes, 1), len(keys) - start)
        if n > 1:
            pages = [memoryview(bytearray(nbytes)) for _ in range(n)]
            batch = keys[start : start + n]
            n_filled = backend.batch_get(batch, [(page,) for page in pages])
            yield from zip(batch[:n_filled], pages, strict=False)
            start += n_filled
            n_ahead = 2 * n if n_filled == n else 0
            continue
        value = backend.get(keys[start])
        yield keys[start], value
        start += 1
        nbytes, n_ahead = _nbytes(value), 2 if batches and value is not None else 0


def _nbytes(value: Buffer | None) -> int:
    return 0 if value is None else memoryview(value).nbytes
