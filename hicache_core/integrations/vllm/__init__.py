"""HiCache's backends in vLLM: a secondary tier of its offloading, and a KV connector.

vLLM is imported when one of the two names is first looked up, so that the rest of this package
needs no vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicache_core.integrations.vllm.connector import HiCacheConnector
    from hicache_core.integrations.vllm.tier import HiCacheTier

__all__ = ["HiCacheConnector", "HiCacheTier"]


def __getattr__(name: str) -> object:
    if name == "HiCacheTier":
        from hicache_core.integrations.vllm.tier import HiCacheTier

        return HiCacheTier
    if name == "HiCacheConnector":
        from hicache_core.integrations.vllm.connector import HiCacheConnector

        return HiCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
