"""Namespace manifests: an object in the store that explains the digest of a storage namespace.

A cache that opens a store writes one such object, under a key that no page has. It holds the JSON
text whose hash is the namespace, padded with spaces to the length of a page and sealed like one.
With it a tool can tell in which field two namespaces differ. A second line of JSON may follow, with
what is not part of the hash.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
        told: what else its writer said; not part of the hash. JSON values only.
    """

    namespace: str
    described: str
    told: Mapping[str, Any] = field(default_factory=dict)

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
    def group(self) -> str:
        """Name of the group of layers whose units are stored there; empty for full pages."""
        return str(self.fields.get("group", ""))

    @property
    def window(self) -> int:
        """Tokens of the window of a group; 0 for a state."""
        return int(self.told.get("window", 0))

    @property
    def chain_page_size(self) -> int:
        """Tokens in a page of the prefixes that keys name; also of a state, whose units have 1."""
        return int(self.told.get("page_size", self.page_size))

    @property
    def object_nbytes(self) -> int:
        """Length of every object of the namespace in bytes, header included; 0 if unknown."""
        fields = self.fields
        stated = fields.get("object_nbytes")
        if isinstance(stated, int):  # the pages of an engine, which says their length
            return HEADER_NBYTES + stated if stated > 0 else 0
        if not {"components", "layers"} <= fields.keys():
            return 0
        first, end = fields["layers"]
        token_nbytes = sum(
            math.prod(shape) * DTYPE_NBYTES[dtype] * (len(layers[0]) if layers else end - first)
            for _, shape, dtype, *layers in fields["components"]
        )
        return int(HEADER_NBYTES + token_nbytes * self.page_size)


def manifest_key(namespace: str) -> str:
    """Returns the key of the manifest of a storage namespace."""
    return f"{namespace}/{MANIFEST_HASH}"


def encode(manifest: Manifest, payload_nbytes: int = 0) -> bytearray:
    """Returns the payload of a manifest's object, padded with spaces.

    Args:
        manifest: to be stored.
        payload_nbytes: length of a page without its header. The payload is longer if its text is.
    """
    text = manifest.described
    if manifest.told:
        text += "\n" + json.dumps(manifest.told, sort_keys=True, allow_nan=False)
    return bytearray(text.encode().ljust(payload_nbytes))


def decode(namespace: str, payload: bytes | bytearray | memoryview) -> Manifest | None:
    """Returns the manifest in ``payload``; None if it is not the one of ``namespace``."""
    try:
        described, _, more = bytes(payload).decode().rstrip(" ").partition("\n")
        fields = json.loads(described)
        told = json.loads(more) if more else {}
    except ValueError:  # not UTF-8, or not JSON
        return None
    whole = isinstance(fields, dict) and {"identity", "layout", "page_size"} <= fields.keys()
    if not whole or not isinstance(told, dict) or namespace_digest(described) != namespace:
        return None
    return Manifest(namespace, described, told)


def manifest_page(
    described: str, object_nbytes: int, told: Mapping[str, Any] | None = None
) -> tuple[str, Page] | None:
    """Returns the manifest as a page that a cache can store; None if pages are too small.

    Args:
        described: of ``kv.keys.describe_namespace``.
        object_nbytes: length of every object, header included.
        told: what else to say.

    Returns:
        Its key, and a page whose header is not filled in yet.
    """
    manifest = Manifest(namespace_digest(described), described, told or {})
    payload = encode(manifest, object_nbytes - HEADER_NBYTES)
    if HEADER_NBYTES + len(payload) > object_nbytes:  # a store may allow one length only
        return None
    header = memoryview(bytearray(HEADER_NBYTES))
    return manifest_key(manifest.namespace), (header, memoryview(payload))


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
