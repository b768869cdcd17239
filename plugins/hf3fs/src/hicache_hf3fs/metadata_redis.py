"""Metadata in Redis or Valkey, for any number of hosts: each method is one script on the server.

All names start with ``{hicache-hf3fs:<store>}:``; the braces keep them on one node of a cluster:

    bind          hash    key -> "slab|slot number|generation|nbytes|end of lease|1 if pinned"
    slabs, fresh  hashes  slab -> number of slots; first slot that was never used
    spaces        hash    namespace -> bytes of its objects
    lru:<slab>:<namespace>, pinned:<slab>:<namespace>
                  zsets   key -> last use; a key is in one of the two
    pins          zset    key -> when its pin ends
    ages          zset    key -> when it was written, if ttl_s is set
    held:<slab>   zset    slot number -> when its reservation or quarantine ends; free if past
    gen:<slab>    hash    slot number -> generation of the reservation

Times are those of the server's clock; only the time in a generation is that of the writer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    IntegrityError,
)
from hicache_core.plugin.backends import masked_text
from hicache_core.storage.base import Finding
from hicache_hf3fs import redis_scripts as scripts
from hicache_hf3fs.metadata import (
    Binding,
    Found,
    Limits,
    MetadataStore,
    SlabUnknown,
    Slot,
    Totals,
    Wanted,
    Written,
    new_generation,
    oldest_generation,
)

_CHUNK = 1000  # objects of one script call, which keeps others waiting for a few ms
_STORED = -1
_UNKNOWN = "UNKNOWNSLAB"

# The first that fits counts.
_ERRORS: tuple[tuple[type[Exception], type[BackendError], str], ...] = (
    (redis.exceptions.AuthenticationError, BackendDenied, "check user and password"),
    (redis.exceptions.NoPermissionError, BackendDenied, "let this user run scripts on its keys"),
    (redis.exceptions.OutOfMemoryError, BackendFull, "raise the server's maxmemory"),
    (redis.exceptions.TimeoutError, BackendTimeout, "raise metadata_timeout_s or check its load"),
    (redis.exceptions.ConnectionError, BackendUnavailable, "check that it runs and is reachable"),
    (redis.exceptions.ReadOnlyError, BackendUnavailable, "it is a replica; give the primary"),
    (redis.exceptions.RedisError, BackendUnavailable, "see the message before this"),
)


class RedisMetadata(MetadataStore):
    """Runs scripts on one server, with one connection for each thread that is in a call."""

    def __init__(self, url: str, store_id: str, limits: Limits) -> None:
        """Connects to nothing; ``open`` does.

        Args:
            url: of the server.
            store_id: id of the store, a part of all names.
            limits: times and quota.
        """
        self.where = masked_text(url)
        self._base = f"{{hicache-hf3fs:{store_id}}}:"
        self._url = url
        self._limits = limits
        self._client: Any = None
        self._scripts: dict[str, Any] = {}

    def open(self) -> None:
        with self._translated():
            client = redis.Redis.from_url(
                self._url,
                socket_timeout=self._limits.timeout_s,
                socket_connect_timeout=self._limits.timeout_s,
                retry=Retry(NoBackoff(), 0),  # ten with pauses, by default: seconds for a request
                decode_responses=True,
            )
            try:
                client.ping()
            except BaseException:
                client.close()
                raise
            self._client = client
            first = scripts.limits(self._limits.ttl_s, self._limits.namespace_quota_nbytes)
            self._scripts = {
                name: client.register_script(first + text) for name, text in scripts.ALL.items()
            }

    def close(self) -> None:
        client, self._client = self._client, None
        self._scripts = {}
        if client is not None:
            client.close()

    def n_slots(self, slab: str) -> int | None:
        with self._translated():
            known = self._client.hget(f"{self._base}slabs", slab)
            return None if known is None else int(known)

    def register(self, slab: str, n_slots: int, found: Sequence[Found]) -> None:
        # docstring inherited
        ordered = sorted(found)
        fresh = 0
        for start in range(0, len(ordered), _CHUNK):
            part = ordered[start : start + _CHUNK]
            # Between those that were found lie slots that are free.
            numbers = {one.number for one in part}
            between = [n for n in range(fresh, part[-1].number + 1) if n not in numbers]
            fresh = part[-1].number + 1
            flat = [x for one in part for x in (one.number, one.generation, one.key, one.nbytes)]
            for holes in range(0, len(between), _CHUNK):
                self._run("restore_free", slab, *between[holes : holes + _CHUNK])
            self._run("restore", slab, *flat)
        self._run("register", slab, n_slots, fresh)

    def lookup(self, keys: Sequence[str], lease_s: float | None = None) -> list[Binding | None]:
        if not keys:
            return []
        values = self._run("lookup", lease_s or self._limits.lease_s, *keys)
        return [_parsed(value) for value in values]

    def leading(self, keys: Sequence[str]) -> int:
        for n, binding in enumerate(self._bindings(keys)):
            if binding is None:
                return n
        return len(keys)

    def present(self, keys: Sequence[str]) -> list[bool]:
        return [binding is not None for binding in self._bindings(keys)]

    def unchanged(self, keys: Sequence[str], bindings: Sequence[Binding]) -> list[bool]:
        return [
            now is not None and now.slot.generation == before.slot.generation
            for now, before in zip(self._bindings(keys), bindings, strict=True)
        ]

    def reserve(self, slab: str, wanted: Sequence[Wanted]) -> list[Slot | None]:
        generations = [new_generation(time.time()) for _ in wanted]
        flat = [
            x
            for want, generation in zip(wanted, generations, strict=True)
            for x in (want.key, want.nbytes, generation)
        ]
        try:
            numbers = self._run("reserve", slab, self._limits.write_lease_s, *flat)
        except redis.exceptions.ResponseError as exc:
            if _UNKNOWN in str(exc):
                raise SlabUnknown(slab) from None
            raise self._error(exc) from exc
        return [
            None if number == _STORED else Slot(slab, number, generation)
            for number, generation in zip(numbers, generations, strict=False)
        ]

    def publish(self, written: Sequence[Written]) -> list[bool]:
        flat = [
            x
            for key, nbytes, slot in written
            for x in (key, nbytes, slot.slab, slot.number, slot.generation)
        ]
        return [bool(answer) for answer in self._run("publish", *flat)]

    def release(self, slots: Sequence[Slot]) -> None:
        self._run("release", *(x for slot in slots for x in slot))

    def delete(self, keys: Sequence[str], generations: Sequence[int] | None = None) -> int:
        wanted: Sequence[int | str] = [""] * len(keys) if generations is None else generations
        flat = [x for pair in zip(keys, wanted, strict=True) for x in pair]
        return sum(
            int(self._run("delete", *flat[start : start + 2 * _CHUNK]))
            for start in range(0, len(flat), 2 * _CHUNK)
        )

    def keys(self, prefix: str) -> Iterator[str]:
        seen = set()
        oldest = self._oldest()
        with self._translated():
            for key, value in self._client.hscan_iter(
                f"{self._base}bind", match=f"{prefix}*", count=_CHUNK
            ):
                if key not in seen and _parsed(value, oldest):  # a scan may show one twice
                    seen.add(key)
                    yield key

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        return sum(
            int(self._run("pin", ttl_s, *keys[start : start + _CHUNK]))
            for start in range(0, len(keys), _CHUNK)
        )

    def usage(self) -> Mapping[str, int]:
        self._drop_expired()
        with self._translated():
            spaces = self._client.hgetall(f"{self._base}spaces")
            return {namespace: int(nbytes) for namespace, nbytes in spaces.items() if nbytes != "0"}

    def totals(self, slab: str) -> Totals:
        self._drop_expired()
        return Totals(*self._run("totals", slab))

    def check_integrity(self) -> None:
        wrong = self._run("check")
        if wrong:
            raise IntegrityError(f"metadata {self.where}: {wrong}")

    def findings(self) -> Iterator[Finding]:
        with self._translated():
            memory = self._client.info("memory")
        limit, policy = int(memory.get("maxmemory", 0)), str(memory.get("maxmemory_policy", ""))
        if limit and policy != "noeviction":
            yield Finding(
                "warning",
                "metadata",
                f"maxmemory-policy is {policy}: the server may drop all bindings at once; set it "
                "to noeviction",
            )
        elif limit and int(memory["used_memory"]) > 0.9 * limit:
            yield Finding(
                "warning",
                "metadata",
                f"{memory['used_memory']} of maxmemory {limit} bytes are used; when it is full, "
                "writes are dropped: raise maxmemory or slot sizes",
            )
        else:
            yield Finding("ok", "metadata", f"maxmemory {limit}, maxmemory-policy {policy}")

    def _bindings(self, keys: Sequence[str]) -> list[Binding | None]:
        if not keys:
            return []
        with self._translated():
            values = self._client.hmget(f"{self._base}bind", list(keys))
        oldest = self._oldest()
        return [_parsed(value, oldest) for value in values]

    def _oldest(self) -> int:
        """Returns the first generation that is not expired."""
        ttl_s = self._limits.ttl_s
        return 0 if ttl_s is None else oldest_generation(time.time(), ttl_s)

    def _drop_expired(self) -> None:
        """Drops expired objects in small parts, so that no other call waits long."""
        while self._limits.ttl_s is not None and self._run("let_go"):
            pass

    def _run(self, name: str, *arguments: str | float) -> Any:
        script: Callable[..., Any] = self._scripts[name]
        with self._translated():
            return script(keys=[self._base], args=arguments)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Translates errors of redis-py to ``BackendError``, except those for an unknown slab."""
        try:
            yield
        except redis.exceptions.RedisError as exc:
            if _UNKNOWN in str(exc):
                raise
            raise self._error(exc) from exc

    def _error(self, exc: redis.exceptions.RedisError) -> BackendError:
        kind, advice = next((k, advice) for found, k, advice in _ERRORS if isinstance(exc, found))
        return kind(f"metadata {self.where}: {masked_text(str(exc))}: {advice}")


def _parsed(value: str | None, oldest: int = 0) -> Binding | None:
    """Parses a value of ``bind``; None if its generation is below ``oldest``."""
    if not value:
        return None
    try:
        slab, number, generation, nbytes, _, _ = value.split("|")
        binding = Binding(Slot(slab, int(number), int(generation)), int(nbytes))
    except ValueError as exc:
        raise BackendCorrupt(f"metadata holds {value!r} instead of a binding") from exc
    return binding if binding.slot.generation >= oldest else None
