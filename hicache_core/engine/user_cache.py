"""Where files are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(kind: str) -> Path:
    """``$XDG_CACHE_HOME/hicache/KIND``, by default in ``~/.cache``; safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "hicache" / kind
