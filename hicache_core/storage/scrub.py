"""Scrubbing: every stored page is read and judged by its seal, and what is no good is removed.

What has no seal of ours may be another tool's, or a page that only its backend knows how to read:
it is told of and stays, unless the caller says otherwise.
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
from hicache_core.storage.sealed import HEADER_NBYTES, MAGIC, mismatch, parse_key

GOOD, VANISHED = "good", "vanished"
UNKNOWN = "unknown"
REMOVED = frozenset(["corrupt", "foreign", "wrong_length"])
"""What nobody can use; ``wrong_version`` may be good for another version of HiCache and stays."""
KINDS = (GOOD, "corrupt", "foreign", "wrong_length", "wrong_version", UNKNOWN, VANISHED)

DEFAULT_BATCH_NBYTES = 64 << 20
_BATCH_KEYS = 1024


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one key.

    Attributes:
        key: as the backend lists it.
        kind: one of ``KINDS``. ``foreign`` is sealed for another key; ``unknown`` has no page key
            or no header of a page; ``vanished`` was listed and is not there any more.
        nbytes: length of the object; 0 if it has vanished.
        removed: whether it was deleted.
    """

    key: str
    kind: str
    nbytes: int
    removed: bool = False


@dataclass
class Tally:
    """Sums over what was checked, by namespace and kind.

    Attributes:
        objects: how many there are.
        nbytes: their bytes.
        n_removed: how many were deleted.
        removed_kinds: what is to be deleted.
    """

    objects: Counter[tuple[str, str]] = field(default_factory=Counter)
    nbytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    n_removed: int = 0
    removed_kinds: frozenset[str] = REMOVED

    def add(self, checked: Checked) -> None:
        """Counts one; keys that are no page keys are one namespace with an empty name."""
        where = (namespace_of(checked.key) if _is_page_key(checked.key) else "", checked.kind)
        self.objects[where] += 1
        self.nbytes[where] += checked.nbytes
        self.n_removed += checked.removed

    @property
    def n_bad(self) -> int:
        """How many were removed, or would have been."""
        return sum(n for (_, kind), n in self.objects.items() if kind in self.removed_kinds)

    def by_namespace(self) -> dict[str, dict[str, Mapping[str, int]]]:
        """Namespace -> kind -> ``objects`` and ``nbytes``; in order of their names."""
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
) -> Iterator[Checked]:
    """Reads what ``backend`` lists, judges it, and removes what nobody can use.

    What is no good is read once more right before it is deleted, so an object that was overwritten
    meanwhile stays, and so does one whose two reads differ: it was spoilt on its way. Between that
    read and the deletion a store has no lock to offer: a good object that comes in that moment is
    lost, which costs its next reader a miss.

    Args:
        backend: opened, and not wrapped in seals: the stored bytes have to be seen.
        prefix: only keys that start with it.
        remove: False to look only.
        kinds: what is removed; ``REMOVED | {UNKNOWN}`` also takes what has no header of a page.
        limit: at most so many keys.
        batch_nbytes: how many bytes are in memory at once, or one object if that is larger.

    Returns:
        One ``Checked`` for each key, as they are read.

    Raises:
        BackendError: it cannot list, or cannot delete and shall; while it is read: it failed.
    """
    listable = backend.capability(Listable)
    if listable is None:
        raise BackendError(
            f"backend {backend.name!r} cannot list its keys (it is not Listable), so nobody can "
            "go through what it holds; its pages are still checked whenever they are read"
        )
    if remove:
        try:
            backend.delete([])
        except NotImplementedError as exc:
            raise BackendError(f"{exc}; scrub it with --dry-run to look only") from exc
    keys = itertools.islice(listable.list_keys(prefix), limit)
    return _scrubbed(backend, keys, batch_nbytes, kinds if remove else frozenset())


def judge(key: str, value: Buffer | None) -> str:
    """Which of ``KINDS`` the object under ``key`` is."""
    if value is None:
        return VANISHED
    data = memoryview(value).cast("B")
    if not _is_page_key(key) or data[: len(MAGIC)] != MAGIC:
        return UNKNOWN
    if data.nbytes < HEADER_NBYTES:
        return "wrong_length"
    return mismatch(key, (data[:HEADER_NBYTES], data[HEADER_NBYTES:])) or GOOD


def _scrubbed(
    backend: StorageBackend, keys: Iterator[str], batch_nbytes: int, kinds: frozenset[str]
) -> Iterator[Checked]:
    while batch := list(itertools.islice(keys, _BATCH_KEYS)):
        for key, value in _read(backend, batch, batch_nbytes):
            checked = Checked(key, judge(key, value), _nbytes(value))
            if checked.kind not in (GOOD, VANISHED):
                checked = _reread(backend, key, value, kinds)
            yield checked


def _reread(
    backend: StorageBackend, key: str, before: Buffer | None, kinds: frozenset[str]
) -> Checked:
    """Judges once more, and removes what is the same at both reads and of one of ``kinds``."""
    value = backend.get(key)
    kind = judge(key, value)
    removed = kind in kinds and value == before
    if removed:
        backend.delete([key])
    return Checked(key, kind, _nbytes(value), removed)


def _read(
    backend: StorageBackend, keys: Sequence[str], batch_nbytes: int
) -> Iterator[tuple[str, Buffer | None]]:
    """The objects under ``keys``, in batches for as long as they have one length.

    The length of an object is known when it was read alone; the next ones most often have it too.
    A batch is twice as large as the last one that came whole.
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


def _is_page_key(key: str) -> bool:
    try:
        parse_key(key)
    except ValueError:
        return False
    return True
