"""Storing a manifest as a cache does, for tests."""

from __future__ import annotations

from hicache_core.storage.manifest import Manifest, manifest_page
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend


def write_manifest(backend: SealedBackend, manifest: Manifest, payload_nbytes: int) -> bool:
    """Stores it among pages of that length; whether it fits."""
    found = manifest_page(manifest.described, HEADER_NBYTES + payload_nbytes)
    return found is not None and backend.batch_set([found[0]], [found[1]]) == 1
