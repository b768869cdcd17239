"""Old import paths: each is a module that warns and hands on the new one's names."""

from __future__ import annotations

import warnings


def warn_moved(old: str, new: str) -> None:
    """Warns whoever imports ``old``; called while that module is imported.

    Args:
        old: the path that was documented in 0.1.
        new: where its names are now.
    """
    warnings.warn(
        f"{old} has moved to {new}; the old path goes in 0.3", DeprecationWarning, stacklevel=3
    )
