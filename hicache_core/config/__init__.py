"""The settings: what they are, where they come from, and how errors in them read."""

import importlib


def __getattr__(name: str) -> object:
    """Hands on ``HiCacheConfig``, which was documented here when ``config`` was one module."""
    if name != "HiCacheConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    moved = importlib.import_module("hicache_core._moved")
    moved.warn_moved(f"{__name__}.{name}", f"hicache_core.{name}")
    return importlib.import_module("hicache_core.config.settings").HiCacheConfig
