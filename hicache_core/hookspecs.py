"""The hooks that plugins implement; called at start-up only, never on the way of a page."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from hicache_core.storage.base import StorageBackend

PROJECT = "hicache"
ENTRY_POINT_GROUP = "hicache.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def hicache_backends() -> Sequence[type[StorageBackend]]:  # type: ignore[empty-body]
    """The backend classes of this plugin.

    The entry point ``hicache.backends`` that names the plugin's module must have the name of one of
    these classes (``StorageBackend.name``).
    """
