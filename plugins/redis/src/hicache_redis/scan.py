"""Enumerates the keys of every server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from hicache_redis.errors import ErrorReply, reply_error
from hicache_redis.topology import Topology

_SCAN_COUNT = b"1000"
_GLOB = re.compile(rb"([*?\[\]\\^])")


def scan(topology: Topology, prefix: bytes) -> Iterator[list[bytes]]:
    """The keys that start with ``prefix``, in lists as the servers hand them out.

    Each list is asked for when it is wanted; no connection is held in between.

    Raises:
        BackendError: a server cannot be asked; a listing without its keys would be no listing.
    """
    pattern = _GLOB.sub(rb"\\\1", prefix) + b"*"
    for pool in topology.pools():
        cursor = b"0"
        while True:
            with pool.lease("list keys") as wire:
                reply = wire.call(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _SCAN_COUNT)
                if isinstance(reply, ErrorReply):
                    raise reply_error(reply, pool.server, "list keys")
            cursor, keys = cast("tuple[bytes, list[bytes]]", reply)
            yield keys
            if cursor == b"0":
                break
