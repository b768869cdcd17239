"""Redis and Valkey as a storage backend of HiCache."""

from __future__ import annotations

from hicache_core.plugin import hookimpl
from hicache_core.storage.base import StorageBackend
from hicache_redis.backend import RedisBackend
from hicache_redis.config import RedisConfig

__all__ = ["RedisBackend", "RedisConfig", "hicache_backends"]


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The backend of this distribution."""
    return [RedisBackend]
