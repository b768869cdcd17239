"""What a storage backend may be built from, beside its contract in ``storage.base``."""

from __future__ import annotations

from hicache_core.config.redact import MASK, masked_text
from hicache_core.process.logs import log_once
from hicache_core.storage.answers import n_leading
from hicache_core.storage.calls import Calls
from hicache_core.storage.lanes import Lanes, default_lanes
from hicache_core.storage.sealed import parse_key
from hicache_core.storage.segments import nbytes_of, scatter
from hicache_core.storage.settings import ConnectTimeout, Nbytes, Seconds, TimeToLive, parse_nbytes
from hicache_core.storage.sqlite import ROOM_NBYTES, Database, is_empty, room_nbytes

__all__ = [
    "MASK",
    "ROOM_NBYTES",
    "Calls",
    "ConnectTimeout",
    "Database",
    "Lanes",
    "Nbytes",
    "Seconds",
    "TimeToLive",
    "default_lanes",
    "is_empty",
    "log_once",
    "masked_text",
    "n_leading",
    "nbytes_of",
    "parse_key",
    "parse_nbytes",
    "room_nbytes",
    "scatter",
]
