"""Threads of storage workers that a test started itself: others may run beside it."""

from __future__ import annotations

import threading


def storage_threads() -> set[threading.Thread]:
    """Those that are alive now."""
    return {t for t in threading.enumerate() if t.name.startswith("hicache-storage")}
