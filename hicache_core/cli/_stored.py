"""What a store holds, by namespace: what the backend counts, and what the manifests say."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hicache_core.cli._backend import Cannot
from hicache_core.cli._cache_choice import described
from hicache_core.storage.base import (
    Listable,
    NamespaceTotals,
    ReportsTotals,
    ReportsUsage,
    StorageBackend,
    namespace_of,
)
from hicache_core.storage.manifest import Manifest, read_manifest

_NAMESPACE_CHARS = 16
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class Stored:
    """One namespace of a store.

    Attributes:
        namespace: the part of its keys before the ``/``.
        objects: how many there are; None if that was not asked, or the backend cannot tell.
        nbytes: their bytes; None if the backend cannot tell.
        oldest: when the oldest object was written, in seconds since 1970; None if unknown.
        newest: when the newest was.
        manifest: what it means; None if there is no manifest.
    """

    namespace: str
    objects: int | None
    nbytes: int | None
    oldest: float | None
    newest: float | None
    manifest: Manifest | None

    @property
    def words(self) -> str:
        """What the namespace is, for people."""
        if self.manifest is not None:
            return described(self.manifest)
        is_cache = len(self.namespace) == _NAMESPACE_CHARS
        return "no manifest" if is_cache else "not the namespace of a cache"

    def as_json(self) -> dict[str, object]:
        """All of it as JSON values."""
        manifest = self.manifest
        return {
            "namespace": self.namespace,
            "objects": self.objects,
            "nbytes": self.nbytes,
            "oldest": self.oldest,
            "newest": self.newest,
            "manifest": None if manifest is None else {**manifest.fields, **manifest.told},
        }


def stored(backend: StorageBackend, *, counts: bool) -> list[Stored]:
    """What the store holds, the largest namespace first.

    Args:
        backend: open, and not sealed.
        counts: whether the number of objects matters; some backends must list all keys for it.

    Raises:
        Cannot: the backend can neither list its keys nor report its usage.
        BackendError: the store cannot answer.
    """
    found = []
    for namespace, totals in _totals(backend, counts=counts).items():
        manifest = read_manifest(backend, namespace) if len(namespace) == _NAMESPACE_CHARS else None
        objects, nbytes, oldest, newest = totals
        if nbytes is None and objects is not None and manifest is not None:
            nbytes = objects * manifest.object_nbytes or None
        found.append(Stored(namespace, objects, nbytes, oldest, newest, manifest))
    return sorted(found, key=lambda one: (-(one.nbytes or 0), one.namespace))


def _totals(
    backend: StorageBackend, *, counts: bool
) -> Mapping[str, tuple[int | None, int | None, float | None, float | None]]:
    """Objects, bytes, oldest and newest by namespace, as far as the backend can tell."""
    reports = backend.capability(ReportsTotals)
    if reports is not None:
        return {name: _parts(totals) for name, totals in reports.namespace_totals().items()}
    usage, lists = backend.capability(ReportsUsage), backend.capability(Listable)
    if usage is None and lists is None:
        raise Cannot(
            f"backend {backend.name!r} can neither list its keys nor report its usage (it is "
            "neither Listable nor ReportsUsage)"
        )
    nbytes = None if usage is None else usage.usage()
    objects: Mapping[str, int] | None = None
    if lists is not None and (counts or nbytes is None):
        objects = Counter(map(namespace_of, lists.list_keys("")))
    names = sorted({*(nbytes or {}), *(objects or {})})
    return {
        name: (
            None if objects is None else objects.get(name, 0),
            None if nbytes is None else nbytes.get(name, 0),
            None,
            None,
        )
        for name in names
    }


def _parts(totals: NamespaceTotals) -> tuple[int, int, float | None, float | None]:
    return totals.objects, totals.nbytes, totals.oldest, totals.newest


def counted(number: int | None) -> str:
    """A number for a table; a dash if it is unknown."""
    return "–" if number is None else f"{number:,}"


def size_words(nbytes: int | None) -> str:
    """Bytes in a unit that fits, with three digits; a dash if unknown: ``1.23 GB``."""
    if nbytes is None:
        return "–"
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def date_words(seconds: float | None) -> str:
    """A time in seconds since 1970 as local date and time; a dash if unknown."""
    if seconds is None:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
