"""The terms under which objects of a namespace are moved: what the manifests of both sides say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hicache_core.storage.base import Buffer, StorageBackend
from hicache_core.storage.manifest import Manifest, decode, manifest_key
from hicache_core.storage.scrub import GOOD, classify
from hicache_core.storage.sealed import HEADER_NBYTES

Refuses = Callable[[str, Manifest | None], str]
"""Says why objects of a namespace, with its manifest if there is one, are not moved; or ''."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one side says of a namespace.

    Attributes:
        manifest: of the namespace; None if there is none, or it is damaged.
        wrong: why no manifest under that key can be right; empty if all is well.
    """

    manifest: Manifest | None = None
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """What objects of a namespace must be like to be moved.

    Attributes:
        object_nbytes: their length; 0 if they have several, or it is not known.
        refused: why none of them is moved; empty if they are.
    """

    object_nbytes: int = 0
    refused: str = ""

    def objection(self, key: str, nbytes: int) -> str:
        """Why an intact object is not moved; empty if it is.

        Args:
            key: of the object.
            nbytes: its length.
        """
        if self.refused:
            return self.refused
        is_page = self.object_nbytes and not key.endswith(_MANIFEST)
        if is_page and nbytes != self.object_nbytes:
            return f"it has {nbytes} bytes, pages of this cache have {self.object_nbytes}"
        return ""


_MANIFEST = manifest_key("")


def said_by(namespace: str, value: Buffer | None) -> Said:
    """What the object under the key of a manifest says.

    Args:
        namespace: 16 hex digits.
        value: the object, header included; None if there is none.
    """
    if classify(manifest_key(namespace), value) != GOOD:
        return Said()
    assert value is not None
    found = decode(namespace, memoryview(value).cast("B")[HEADER_NBYTES:])
    return Said(found) if found else Said(wrong="its manifest describes another cache")


def said_in(backend: StorageBackend, namespace: str) -> Said:
    """What a store says of a namespace.

    Args:
        backend: open, and not sealed.
        namespace: 16 hex digits.

    Raises:
        BackendError: the store cannot answer.
    """
    return said_by(namespace, backend.get(manifest_key(namespace)))


def agreed(source: Said, target: Said) -> Terms:
    """The terms for a namespace of which ``source`` and ``target`` say something."""
    if source.wrong:
        return Terms(refused=f"{source.wrong}, in the source")
    if target.wrong:
        return Terms(refused=f"{target.wrong}, in the target")
    one, other = source.manifest, target.manifest
    if one is not None and other is not None:
        for name in ("described", "window", "chain_page_size", "object_nbytes"):
            here, there = getattr(one, name), getattr(other, name)
            if here != there:
                return Terms(refused=f"{name} is {here} in the source and {there} in the target")
    known = one or other
    return Terms(0 if known is None else known.object_nbytes)
