"""Every test of the engine gives back what it took; see ``tests/leaks.py``."""

from __future__ import annotations

from tests.leaks import leak_watch

__all__ = ["leak_watch"]
