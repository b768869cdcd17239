"""3FS as a storage backend of HiCache: KV pages in slab files, by USRBIO or plain POSIX calls."""

from __future__ import annotations

from hicache_core.plugin import hookimpl
from hicache_core.storage.base import StorageBackend
from hicache_hf3fs.backend import Hf3fsBackend
from hicache_hf3fs.config import Hf3fsConfig

__all__ = ["Hf3fsBackend", "Hf3fsConfig", "hicache_backends"]


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The backend of this distribution."""
    return [Hf3fsBackend]
