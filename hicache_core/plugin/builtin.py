"""The core's own plugin: ``memory``, ``file`` and ``tcp``, found in the same way as others."""

from __future__ import annotations

from hicache_core.kv_transfer.base import KvTransferBackend
from hicache_core.plugin.hookspecs import hookimpl
from hicache_core.storage.base import StorageBackend


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The storage backends of the core."""
    from hicache_core.storage.file.backend import FileBackend
    from hicache_core.storage.memory import MemoryBackend

    return [MemoryBackend, FileBackend]


@hookimpl
def hicache_transfer_backends() -> list[type[KvTransferBackend]]:
    """The transfer backend of the core."""
    from hicache_core.kv_transfer.tcp import TcpTransfer

    return [TcpTransfer]
