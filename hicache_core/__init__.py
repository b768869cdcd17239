"""HiCache: a prefix cache for LLM servers in three tiers: device, host and shared storage.

The public names; each is imported when it is first used, so that the author of a backend, who needs
``hicache_core.storage.base`` only, never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicache_core.build.cache import HiCache
    from hicache_core.config.settings import HiCacheConfig
    from hicache_core.errors import HiCacheError
    from hicache_core.kv.spec import KVSpec
    from hicache_core.pools.device import DevicePool
    from hicache_core.storage.base import BackendConfig, StorageBackend
    from hicache_core.types import BackendContext, Namespace

    __version__: str

_MODULES = {
    "BackendConfig": "hicache_core.storage.base",
    "BackendContext": "hicache_core.types",
    "DevicePool": "hicache_core.pools.device",
    "HiCache": "hicache_core.build.cache",
    "HiCacheConfig": "hicache_core.config.settings",
    "HiCacheError": "hicache_core.errors",
    "KVSpec": "hicache_core.kv.spec",
    "Namespace": "hicache_core.types",
    "StorageBackend": "hicache_core.storage.base",
}

__all__ = [
    "BackendConfig",
    "BackendContext",
    "DevicePool",
    "HiCache",
    "HiCacheConfig",
    "HiCacheError",
    "KVSpec",
    "Namespace",
    "StorageBackend",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Imports a public name at its first use."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("hicache-core")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
