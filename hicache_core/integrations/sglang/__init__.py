"""SGLang's HiCache on our storage backends, and the flags that choose one.

``--hicache-storage-backend dynamic`` loads ``HiCacheBackend`` from here. It is imported on first
use, so that settings and flags can be read where SGLang is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicache_core.integrations.sglang.backend import HiCacheBackend as HiCacheBackend

__all__ = ["HiCacheBackend"]


def __getattr__(name: str) -> object:
    if name == "HiCacheBackend":
        from hicache_core.integrations.sglang.backend import HiCacheBackend

        return HiCacheBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
