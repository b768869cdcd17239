"""Namespace manifests: an object in the store that explains the digest of a storage namespace.

A cache that opens a store writes one such object, under a key that no page has. It holds the JSON
text whose hash is the namespace, padded with spaces to the length of a page and sealed like one.
With it a tool can tell in which field two namespaces differ.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from hicache_core.kv.keys import namespace_digest
from hicache_core.kv.spec import DTYPE_NBYTES
from hicache_core.storage.base import Listable, ReportsUsage, StorageBackend
from hicache_core.storage.sealed import HEADER_NBYTES, mismatch
from hicache_core.types import Page

logger = logging.getLogger(__name__)

MANIFEST_HASH = sha256(b"hicache-namespace-manifest-v1").hexdigest()
"""Takes the place of the page hash in the key of a manifest."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a storage namespace.

    Attributes:
        namespace: 16 hex digits.
        described: the text that was hashed (``kv.keys.describe_namespace``).
    """

    namespace: str
    described: str

    @classmethod
    def of(cls, described: str) -> Manifest:
        """Returns the manifest of a text made by ``describe_namespace``."""
        return cls(namespace_digest(described), described)

    @property
    def fields(self) -> dict[str, Any]:
        """The described values by name, including those of the model's identity."""
        fields: dict[str, Any] = json.loads(self.described)
        identity: dict[str, Any] = fields.pop("identity")
        return fields | identity

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return int(self.fields["page_size"])

    @property
    def object_nbytes(self) -> int:
        """Length of every object of the namespace in bytes, header included; 0 if unknown."""
        fields = self.fields
        if not {"components", "layers"} <= fields.keys():
            return 0
        row_nbytes = sum(math.prod(s) * DTYPE_NBYTES[dtype] for _, s, dtype in fields["components"])
        first, end = fields["layers"]
        return int(HEADER_NBYTES + row_nbytes * (end - first) * self.page_size)


def manifest_key(namespace: str) -> str:
    """Returns the key of the manifest of a storage namespace."""
    return f"{namespace}/{MANIFEST_HASH}"


def encode(manifest: Manifest, payload_nbytes: int) -> bytes | None:
    """Returns the payload of a manifest's object; None if pages are too small to hold it.

    Args:
        manifest: to be stored.
        payload_nbytes: length of a page without its header: a store may allow one length only.
    """
    payload = manifest.described.encode().ljust(payload_nbytes)
    return payload if len(payload) == payload_nbytes else None


def decode(namespace: str, payload: bytes | bytearray | memoryview) -> Manifest | None:
    """Returns the manifest in ``payload``; None if it is not the one of ``namespace``."""
    try:
        manifest = Manifest.of(bytes(payload).decode().rstrip(" "))
        fields = json.loads(manifest.described)
    except ValueError:  # not UTF-8, or not JSON
        return None
    whole = isinstance(fields, dict) and {"identity", "layout", "page_size"} <= fields.keys()
    return manifest if whole and manifest.namespace == namespace else None


def manifest_page(described: str, object_nbytes: int) -> tuple[str, Page] | None:
    """Returns the manifest as a page that a cache can store; None if pages are too small.

    Args:
        described: of ``kv.keys.describe_namespace``.
        object_nbytes: length of every object, header included.

    Returns:
        Its key, and a page whose header is not filled in yet.
    """
    manifest = Manifest.of(described)
    payload = encode(manifest, object_nbytes - HEADER_NBYTES)
    if payload is None:
        return None
    header = memoryview(bytearray(HEADER_NBYTES))
    return manifest_key(manifest.namespace), (header, memoryview(bytearray(payload)))


def read_manifest(backend: StorageBackend, namespace: str) -> Manifest | None:
    """Reads the manifest of a namespace; None if there is none or it is damaged.

    Args:
        backend: open, and not sealed: a sealed one would delete a damaged manifest.
        namespace: 16 hex digits.

    Raises:
        BackendError: the store cannot answer.
    """
    key = manifest_key(namespace)
    value = backend.get(key)
    if value is None:
        return None
    data = memoryview(value).cast("B")
    header, payload = data[:HEADER_NBYTES], data[HEADER_NBYTES:]
    if len(header) < HEADER_NBYTES or mismatch(key, (header, payload)) is not None:
        return None
    return decode(namespace, payload)


def namespaces(backend: StorageBackend) -> list[str]:
    """Returns the storage namespaces that have objects in a store, sorted.

    Empty if the store can neither report usage nor list its keys. Listing reads the names of all
    objects, which takes long in a large store.

    Raises:
        BackendError: the store cannot answer.
    """
    return sorted({name for name in _names(backend) if len(name) == 16})


def _names(backend: StorageBackend) -> Iterator[str]:
    reports, lists = backend.capability(ReportsUsage), backend.capability(Listable)
    if reports is not None:
        yield from reports.usage()
    elif lists is not None:
        for key in lists.list_keys(""):
            yield key.partition("/")[0]


def read_manifests(backend: StorageBackend) -> Mapping[str, Manifest | None]:
    """Reads the manifest of each namespace in a store; None for those without one.

    Raises:
        BackendError: the store cannot answer.
    """
    return {namespace: read_manifest(backend, namespace) for namespace in namespaces(backend)}
