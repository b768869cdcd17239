"""Mooncake as a storage backend of HiCache: KV pages in the pooled memory of many servers."""

from __future__ import annotations

from hicache_core.plugin import hookimpl
from hicache_core.storage.base import StorageBackend
from hicache_mooncake.backend import MooncakeBackend
from hicache_mooncake.config import MooncakeConfig

__all__ = ["MooncakeBackend", "MooncakeConfig", "hicache_backends"]


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The backend of this distribution."""
    return [MooncakeBackend]
