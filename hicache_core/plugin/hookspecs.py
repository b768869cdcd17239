"""The hooks that plugins implement; called at start-up only, never on the way of a page."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from hicache_core.kv_transfer.base import KvTransferBackend
from hicache_core.storage.base import StorageBackend

PROJECT = "hicache"
ENTRY_POINT_GROUP = "hicache.backends"
TRANSFER_GROUP = "hicache.transfer_backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def hicache_backends() -> Sequence[type[StorageBackend]]:  # type: ignore[empty-body]
    """The backend classes of this plugin.

    The entry point ``hicache.backends`` that names the plugin's module must have the name of one of
    these classes (``StorageBackend.name``).
    """


@hookspec
def hicache_transfer_backends() -> Sequence[type[KvTransferBackend]]:  # type: ignore[empty-body]
    """The KV transfer backends of this plugin.

    The entry point ``hicache.transfer_backends`` that names the plugin's module must have the name
    of one of these classes (``KvTransferBackend.name``).
    """
