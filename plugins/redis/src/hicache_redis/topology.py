"""The server of each key: a single server, a primary named by Sentinels, or a cluster."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from hicache_core.errors import BackendCorrupt, BackendError, BackendUnavailable
from hicache_core.plugin.backends import Lanes
from hicache_redis.config import DEFAULT_PORT, RedisConfig, split_address
from hicache_redis.connections import Dialer, Pool, shown
from hicache_redis.errors import ErrorReply, reply_error
from hicache_redis.operations import Operation, Redirect
from hicache_redis.resp import Reply, Wire

_REFRESH_INTERVAL_S = 0.5
_MAX_ASKED = 3


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a batch for one connection.

    Attributes:
        pool: of the server.
        indices: of the keys, ascending.
        asking: see ``operations.run``.
    """

    pool: Pool
    indices: Sequence[int]
    asking: bool = False


class Topology(ABC):
    """Splits batches over servers and connections. Any thread may call any method."""

    @abstractmethod
    def pools(self) -> list[Pool]:
        """Returns every server that has slots now."""

    @abstractmethod
    def shares(self, operation: Operation) -> list[Share]:
        """Splits a batch; a key in none of the shares has no server."""

    @abstractmethod
    def follow(self, redirects: Sequence[Redirect]) -> list[Share]:
        """Returns the shares of redirected keys, in the order to run them."""

    def failed(self, pool: Pool) -> None:
        """Is called when a server cannot be reached or has become a replica."""
        pool.drop_idle()

    @abstractmethod
    def close(self) -> None:
        """Closes every connection."""


class SingleServer(Topology):
    """One server, or the primary named by Sentinels. Large batches use several connections."""

    def __init__(self, config: RedisConfig, dialer: Dialer, lanes: Lanes) -> None:
        """Connects to nothing.

        Args:
            config: the settings.
            dialer: opens connections.
            lanes: threads over which large batches are split.
        """
        self._lanes = lanes
        address = config.socket_path or config.address

        def dial() -> Wire:
            # Sentinels are asked each time: after a fail-over the next goes to the new primary.
            return dialer.dial(dialer.primary() if config.sentinels else address)

        self._pool = Pool(config.sentinel_master or shown(address), dial, config)

    def pools(self) -> list[Pool]:
        return [self._pool]

    def shares(self, operation: Operation) -> list[Share]:
        parts = self._lanes.split(len(operation.keys), operation.nbytes)
        return [Share(self._pool, part) for part in parts]

    def follow(self, redirects: Sequence[Redirect]) -> list[Share]:
        reply = ErrorReply(f"MOVED to {redirects[0].address}")
        raise reply_error(reply, self._pool.server, "serve a key")

    def close(self) -> None:
        self._pool.close()


@dataclass(frozen=True)
class _Map:
    """The server of each slot: an index into ``pools``, or -1 if it has none."""

    pools: tuple[Pool, ...]
    owner_of_slot: tuple[int, ...]


class Cluster(Topology):
    """A Redis Cluster. Each shard gets its keys over its own connection, some shards at a time."""

    def __init__(self, config: RedisConfig, dialer: Dialer) -> None:
        """Connects to nothing; the map is read when it is first needed."""
        self._config = config
        self._dialer = dialer
        self._entry_points = [
            config.address,
            *(split_address(node, DEFAULT_PORT) for node in config.nodes),
        ]
        self._lock = threading.Lock()
        self._pool_of: dict[tuple[str, int], Pool] = {}
        self._map: _Map | None = None
        self._stale = True
        self._next_refresh = 0.0

    def pools(self) -> list[Pool]:
        return list((self._map or self._current()).pools)

    def shares(self, operation: Operation) -> list[Share]:
        current = self._current()
        parts: dict[int, list[int]] = {}
        for n, key in enumerate(operation.keys):
            parts.setdefault(current.owner_of_slot[key_slot(key)], []).append(n)
        return [Share(current.pools[owner], part) for owner, part in parts.items() if owner >= 0]

    def follow(self, redirects: Sequence[Redirect]) -> list[Share]:
        parts: dict[tuple[str, bool], list[int]] = {}
        for redirect in redirects:
            parts.setdefault((redirect.address, redirect.asking), []).append(redirect.index)
            self._stale = self._stale or not redirect.asking
        shares = []
        for (address, asking), part in parts.items():
            host, _, port = address.rpartition(":")
            if not port.isdecimal():
                raise BackendCorrupt(f"the cluster redirects to {address!r}: not an address")
            shares.append(Share(self._pool((host, int(port))), sorted(part), asking))
        return shares

    def failed(self, pool: Pool) -> None:
        super().failed(pool)
        self._stale = True  # a replica may have taken its place

    def close(self) -> None:
        with self._lock:
            pools, self._pool_of = list(self._pool_of.values()), {}
        for pool in pools:
            pool.close()

    def _pool(self, address: tuple[str, int]) -> Pool:
        with self._lock:
            return self._pool_locked(address)

    def _pool_locked(self, address: tuple[str, int]) -> Pool:
        pool = self._pool_of.get(address)
        if pool is None:
            dial = partial(self._dialer.dial, address)
            pool = Pool(shown(address), dial, self._config, rests=True)
            self._pool_of[address] = pool
        return pool

    def _current(self) -> _Map:
        current = self._map
        if current is None or (self._stale and time.monotonic() >= self._next_refresh):
            with self._lock:
                if self._map is current and time.monotonic() >= self._next_refresh:
                    self._refresh()
                current = self._map or current
        if current is None:
            raise BackendUnavailable("the map of the cluster's slots is not known yet")
        return current

    def _refresh(self) -> None:
        """Reads the map of slots from a node; the caller holds the lock.

        If there is a map already, only a few random nodes are tried: the next call tries others.

        Raises:
            BackendError: no node answers, and there is no older map.
        """
        self._next_refresh = time.monotonic() + _REFRESH_INTERVAL_S
        addresses = self._entry_points
        if self._map is not None:
            known = [*self._pool_of, *self._entry_points]
            addresses = random.sample(known, min(_MAX_ASKED, len(known)))
        error: BackendError | None = None
        for address in addresses:
            try:
                self._map = self._read_map(address)
                self._stale = False
                break
            except BackendError as another:
                error = error or another
        if self._map is None and error is not None:
            raise error

    def _read_map(self, address: tuple[str, int]) -> _Map:
        pool = self._pool_locked(address)
        with pool.lease("describe the cluster") as wire:
            reply = wire.call(b"CLUSTER", b"SLOTS")
            if isinstance(reply, ErrorReply):
                raise reply_error(reply, pool.server, "describe the cluster")
        owners: dict[Pool, int] = {}
        owner_of_slot = [-1] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port) in _ranges(reply, address[0]):
            owner = self._pool_locked((host, port))
            n_owner = owners.setdefault(owner, len(owners))
            owner_of_slot[first : last + 1] = [n_owner] * (last + 1 - first)
        for left in set(self._pool_of.values()).difference(owners):
            left.drop_idle()  # a replica, or a node that has gone
        if not owners:
            raise BackendUnavailable(f"redis {pool.server} knows no slot of its cluster yet")
        return _Map(tuple(owners), tuple(owner_of_slot))


def _ranges(reply: Reply, asked_host: str) -> Iterator[tuple[int, int, tuple[str, int]]]:
    """Yields first slot, last slot and primary from a reply to CLUSTER SLOTS."""
    for first, last, primary, *_ in cast("list[list[Any]]", reply):
        # An empty host means the one that was asked; "?" is a node that does not know its own.
        host = bytes(primary[0] or b"").decode()
        yield int(first), int(last), (asked_host if host in ("", "?") else host, int(primary[1]))
