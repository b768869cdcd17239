"""What a transfer backend is, and what it may be built from."""

from __future__ import annotations

from hicache_core.config.hosts import WILDCARDS, is_loopback, joined
from hicache_core.kv_transfer.base import (
    KvTransferBackend,
    Notice,
    TransferConfig,
    TransferContext,
    TransferState,
)
from hicache_core.kv_transfer.carrier import Carrier
from hicache_core.kv_transfer.page_memory import PageMemory
from hicache_core.kv_transfer.peers import PeerConfig, PeerTransfer
from hicache_core.kv_transfer.wire import Connection, Frame

__all__ = [
    "WILDCARDS",
    "Carrier",
    "Connection",
    "Frame",
    "KvTransferBackend",
    "Notice",
    "PageMemory",
    "PeerConfig",
    "PeerTransfer",
    "TransferConfig",
    "TransferContext",
    "TransferState",
    "is_loopback",
    "joined",
]
