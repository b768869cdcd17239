"""Pages in Redis or Valkey, moved between socket and page memory without a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from hicache_core.errors import BackendUnavailable, UseAfterClose
from hicache_core.plugin.backends import Lanes
from hicache_core.storage.base import (
    BackendConfig,
    Buffer,
    Finding,
    NamespaceTotals,
    StorageBackend,
    namespace_of,
)
from hicache_core.types import BackendContext, Page
from hicache_redis.config import RedisConfig
from hicache_redis.connections import Dialer
from hicache_redis.diagnose import diagnose
from hicache_redis.dispatch import Dispatcher
from hicache_redis.errors import reply_error
from hicache_redis.memory import string_nbytes
from hicache_redis.operations import (
    Count,
    CountEach,
    Fetch,
    FetchAny,
    FetchEach,
    Probe,
    Remove,
    Store,
    Touch,
)
from hicache_redis.pins import PinRefresher
from hicache_redis.scan import measure, scan
from hicache_redis.topology import Cluster, SingleServer, Topology

_REMOVE_KEYS = 1024


class RedisBackend(StorageBackend):
    """Immutable objects as strings of a Redis or Valkey server, primary or cluster."""

    name: ClassVar[str] = "redis"
    Config: ClassVar[type[BackendConfig]] = RedisConfig

    def __init__(self, config: RedisConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self.settings = config
        self._prefix = config.key_prefix.encode()
        self._ttl_ms = None if config.ttl_s is None else max(1, round(config.ttl_s * 1000))
        self._opened: tuple[Dispatcher, Lanes, PinRefresher] | None = None

    @classmethod
    def taken_nbytes(cls, nbytes: int) -> int:
        """Returns the memory of a string in a server with jemalloc, the default on Linux."""
        return string_nbytes(nbytes)

    @property
    def dispatcher(self) -> Dispatcher:
        """The connected servers.

        Raises:
            UseAfterClose: the backend is not open.
        """
        if self._opened is None:
            raise UseAfterClose("the redis backend is not open; call open() first")
        return self._opened[0]

    @property
    def _pins(self) -> PinRefresher:
        if self._opened is None:
            raise UseAfterClose("the redis backend is not open; call open() first")
        return self._opened[2]

    def check_reachable(self) -> None:
        self.open()
        self.close()

    def open(self) -> None:
        if self._opened is not None:
            return
        config = self.settings
        n_lanes = config.batch_connections
        if not config.cluster:  # a lane must not wait for the connection of another one
            n_lanes = min(n_lanes, config.max_connections)
        lanes = Lanes(n_lanes, "hicache-redis")
        dialer = Dialer(config)
        topology: Topology
        if config.cluster:
            topology = Cluster(config, dialer)
        else:
            topology = SingleServer(config, dialer, lanes)
        dispatcher = Dispatcher(topology, lanes, config.retries)
        try:
            # Credentials, rights and role fail here, not at the first page.
            dispatcher.run(Count([self._whole("probe")]))
            if not self.context.read_only:  # a replica refuses even this, and may be read
                dispatcher.run(Probe([self._whole("probe")]))
        except BaseException:
            topology.close()
            lanes.close()
            raise
        pins = PinRefresher(lambda keys: dispatcher.run(Touch(keys)))
        self._opened = dispatcher, lanes, pins

    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            dispatcher, lanes, pins = opened
            pins.close()
            dispatcher.topology.close()
            lanes.close()

    def get(self, key: str) -> Buffer | None:
        operation = FetchAny([self._whole(key)])
        self.dispatcher.run(operation)
        return operation.values[0]

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def set(self, key: str, value: Buffer) -> None:
        operation = self._store([key], [(memoryview(value).cast("B"),)])
        if self.dispatcher.run(operation).n_leading == 0:
            self.dispatcher.count("dropped_writes", 1)
            if operation.refusal is not None:
                raise reply_error(operation.refusal, "server", f"store {key}")
            raise BackendUnavailable(f"the redis shard of {key} is down; the others go on")

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            self.dispatcher.run(Remove([self._whole(key) for key in keys]))

    def batch_exists(self, keys: Sequence[str]) -> int:
        dispatcher = self.dispatcher
        if not keys:
            return 0
        return dispatcher.run(Count([self._whole(key) for key in keys])).n_leading

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        dispatcher = self.dispatcher
        _check_lengths(keys, pages)
        return self._fetch(dispatcher, Fetch, keys, pages).n_leading if keys else 0

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        dispatcher = self.dispatcher
        _check_lengths(keys, pages)
        if not keys:
            return 0
        n_stored = dispatcher.run(self._store(keys, pages)).n_leading
        if n_stored < len(keys):
            dispatcher.count("dropped_writes", len(keys) - n_stored)
        return n_stored

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        dispatcher = self.dispatcher
        if not keys:
            return []
        return dispatcher.run(CountEach([self._whole(key) for key in keys])).answers

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        dispatcher = self.dispatcher
        _check_lengths(keys, pages)
        return self._fetch(dispatcher, FetchEach, keys, pages).answers if keys else []

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        """Stores pages; a full server is sent no more of them, the others of a cluster are."""
        dispatcher = self.dispatcher
        _check_lengths(keys, pages)
        if not keys:
            return []
        stored = dispatcher.run(self._store(keys, pages)).answers
        if not all(stored):
            dispatcher.count("dropped_writes", stored.count(False))
        return stored

    def bounds_calls(self) -> bool:
        """Returns True: each wait has a limit, and no thread goes on after its call."""
        return True

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yields every key that starts with ``prefix``, in any order; some perhaps twice."""
        start = len(self._prefix)
        for keys in scan(self.dispatcher.topology, self._whole(prefix)):
            for key in keys:
                yield key[start:].decode(errors="replace")

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; returns how many there were."""
        dispatcher = self.dispatcher
        n_removed = 0
        for keys in scan(dispatcher.topology, self._whole(prefix)):
            for start in range(0, len(keys), _REMOVE_KEYS):
                n_removed += dispatcher.run(Remove(keys[start : start + _REMOVE_KEYS])).n_yes
        return n_removed

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """See ``Pins``. Touches ``keys`` now, and every few seconds until ``ttl_s`` has passed.

        The pin ends with this backend. Its effect depends on the eviction policy of the server.
        """
        dispatcher = self.dispatcher
        whole = [self._whole(key) for key in keys]
        if not whole:
            return 0
        n_present = dispatcher.run(Touch(whole)).n_yes
        self._pins.pin(whole, ttl_s)
        return n_present

    def usage(self) -> Mapping[str, int]:
        """Returns bytes by namespace. Slow: asks for every key."""
        return {name: totals.nbytes for name, totals in self.namespace_totals().items()}

    def namespace_totals(self) -> Mapping[str, NamespaceTotals]:
        """Returns number and bytes of objects by namespace. As slow as ``usage``."""
        objects: Counter[str] = Counter()
        usage: Counter[str] = Counter()
        start = len(self._prefix)
        for key, nbytes in measure(self.dispatcher.topology, self._prefix):
            namespace = namespace_of(key[start:].decode(errors="replace"))
            objects[namespace] += 1
            usage[namespace] += nbytes
        return {name: NamespaceTotals(n, usage[name]) for name, n in objects.items()}

    def stats(self) -> Mapping[str, float]:
        """Returns counters since ``open`` and numbers of connections; calls no server."""
        dispatcher = self.dispatcher
        pools = dispatcher.topology.pools()
        known = ("dropped_writes", "wrong_size_objects", "shard_failures", "redirects",
                 "retries", "unserved_batches")  # fmt: skip
        return {
            **{name: float(dispatcher.counts[name]) for name in known},
            "pinned_objects": float(len(self._pins)),
            "connections": float(sum(pool.n_open for pool in pools)),
            "connections_opened": float(sum(pool.n_opened for pool in pools)),
        }

    def diagnose(self) -> Iterator[Finding]:
        """Yields findings for `hicache doctor`; writes, reads and removes one object of its own."""
        return diagnose(self, self.dispatcher.topology, self.settings)

    def _whole(self, key: str) -> bytes:
        """Returns the key in the database, with the prefix."""
        return self._prefix + key.encode()

    def _fetch(
        self, dispatcher: Dispatcher, kind: type[Fetch], keys: Sequence[str], pages: Sequence[Page]
    ) -> Fetch:
        whole = [self._whole(key) for key in keys]
        operation = dispatcher.run(kind(whole, pages, self.settings.window_nbytes))
        if operation.n_wrong_size:
            dispatcher.count("wrong_size_objects", operation.n_wrong_size)
        return operation

    def _store(self, keys: Sequence[str], pages: Sequence[Page]) -> Store:
        whole = [self._whole(key) for key in keys]
        return Store(whole, pages, self.settings.window_nbytes, self._ttl_ms)


def _check_lengths(keys: Sequence[str], pages: Sequence[Page]) -> None:
    if len(keys) != len(pages):
        raise ValueError(f"{len(keys)} keys for {len(pages)} pages")
