"""A backend as an L2 adapter of LMCache's server, which loads it as a plug-in::

    {"type": "plugin", "module_path": "hicache_core.integrations.lmcache",
     "class_name": "HiCacheL2Adapter",
     "adapter_params": {"backend": "file", "backend_config": {"path": "/var/cache/kv"}}}

LMCache is imported when the class is first looked up: the rest of this package needs none.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from hicache_core.integrations.lmcache.settings import check_version

if TYPE_CHECKING:
    from hicache_core.integrations.lmcache.adapter import HiCacheL2Adapter as HiCacheL2Adapter

__all__ = ["HiCacheL2Adapter"]


def __getattr__(name: str) -> object:
    if name == "HiCacheL2Adapter":
        check_version(version("lmcache"))
        from hicache_core.integrations.lmcache.adapter import HiCacheL2Adapter

        return HiCacheL2Adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
