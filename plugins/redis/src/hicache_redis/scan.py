"""Lists the keys of every server, and the lengths of their objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import cast

from hicache_redis.connections import Pool
from hicache_redis.errors import MISSES, ErrorReply, reply_error
from hicache_redis.resp import Reply, command
from hicache_redis.topology import Topology

_SCAN_COUNT = b"1000"
_NOT_HERE = MISSES | {"MOVED", "ASK"}  # another program's, or gone to another server meanwhile
_TOUCH_AGAIN = (b"CLIENT", b"NO-TOUCH", b"OFF")
_MEASURING = "measure objects and leave their order"
_GLOB = re.compile(rb"([*?\[\]\\^])")


def scan(topology: Topology, prefix: bytes) -> Iterator[list[bytes]]:
    """Yields the keys that start with ``prefix``, in the lists that the servers return.

    Each list is requested when it is needed; no connection is held in between.

    Raises:
        BackendError: a server does not answer: the list would be incomplete.
    """
    for _, keys in _scan(topology, prefix):
        yield keys


def measure(topology: Topology, prefix: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the keys that start with ``prefix``, each once, with the lengths of their objects.

    Keys that are stored or removed meanwhile may be missed. Does not count as a use of any key.

    Raises:
        BackendError: a server cannot be asked.
    """
    seen: set[bytes] = set()
    for pool, found in _scan(topology, prefix):
        keys = [key for key in dict.fromkeys(found) if key not in seen]
        seen.update(keys)
        for key, reply in zip(keys, _lengths(pool, keys), strict=True):
            if isinstance(reply, ErrorReply) and reply.code not in _NOT_HERE:
                raise reply_error(reply, pool.server, "measure objects")
            if isinstance(reply, int) and reply:
                yield key, reply


def _lengths(pool: Pool, keys: Sequence[bytes]) -> list[Reply]:
    """Returns the lengths of objects, without counting as a use of their keys.

    Before version 7.2 Redis counts a question for a length as a use. There it is what the server
    takes for an object, up to a quarter more.
    """
    with pool.lease("measure objects") as wire:
        first = wire.call(b"CLIENT", b"NO-TOUCH", b"ON")
        if isinstance(first, ErrorReply):
            if "unknown subcommand" not in first.lower():
                raise reply_error(first, pool.server, _MEASURING)
            wire.send([command(b"MEMORY", b"USAGE", key) for key in keys])
            return [wire.read_reply() for _ in keys]
        wire.send([*(command(b"STRLEN", key) for key in keys), command(*_TOUCH_AGAIN)])
        *lengths, last = (wire.read_reply() for _ in range(len(keys) + 1))
        if isinstance(last, ErrorReply):
            raise reply_error(last, pool.server, _MEASURING)
    return lengths


def _scan(topology: Topology, prefix: bytes) -> Iterator[tuple[Pool, list[bytes]]]:
    """Yields each server with some of its keys."""
    pattern = _GLOB.sub(rb"\\\1", prefix) + b"*"
    for pool in topology.pools():
        cursor = b"0"
        while True:
            with pool.lease("list keys") as wire:
                reply = wire.call(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _SCAN_COUNT)
                if isinstance(reply, ErrorReply):
                    raise reply_error(reply, pool.server, "list keys")
            cursor, keys = cast("tuple[bytes, list[bytes]]", reply)
            yield pool, keys
            if cursor == b"0":
                break
