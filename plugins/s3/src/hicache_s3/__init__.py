"""S3 as a storage backend of HiCache: KV pages in any S3-compatible object store."""

from __future__ import annotations

from hicache_core.plugin import hookimpl
from hicache_core.storage.base import StorageBackend
from hicache_s3.backend import S3Backend
from hicache_s3.config import S3Config

__all__ = ["S3Backend", "S3Config", "hicache_backends"]


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The backend of this distribution."""
    return [S3Backend]
