"""The checks of ``hicache doctor redis``."""

from __future__ import annotations

import ipaddress
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

from hicache_core.storage.base import Finding, StorageBackend
from hicache_redis.config import RedisConfig
from hicache_redis.connections import Pool
from hicache_redis.errors import ErrorReply
from hicache_redis.resp import Wire
from hicache_redis.topology import Topology

_PROBE_KEY = "doctor/probe"
_PROBE_NBYTES = 4 * 2**20
_N_PINGS = 20
_ROUNDED_UP = 1.1


def diagnose(backend: StorageBackend, topology: Topology, config: RedisConfig) -> Iterator[Finding]:
    """Yields findings on every server, then on writing and reading one object.

    Args:
        backend: open.
        topology: its servers.
        config: its settings.

    Raises:
        BackendError: a server cannot be asked.
    """
    pools = topology.pools()
    yield Finding("ok", "address", f"{config.shown_url}: {len(pools)} server(s) hold the keys")
    yield _encryption(config)
    for pool in pools:
        with pool.lease("examine") as wire:
            findings = list(_server(pool, wire))
        yield from findings
    yield from _round_trip(backend, pools, config)


def _encryption(config: RedisConfig) -> Finding:
    if config.tls or config.socket_path is not None or _is_loopback(config.address[0]):
        return Finding("ok", "network", "encrypted, or it does not leave this host")
    return Finding(
        "warning",
        "network",
        "pages and passwords travel in the clear; use rediss:// unless the network is yours alone",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server(pool: Pool, wire: Wire) -> Iterator[Finding]:
    info = _info(wire)
    if not info:
        yield Finding(
            "warning", "server", f"{pool.server} refuses INFO; add +info to this user's rights"
        )
        return
    product = "valkey" if "valkey_version" in info else "redis"
    version = info.get("valkey_version") or info.get("redis_version", "of unknown version")
    role = info.get("role", "master")
    text = f"{pool.server}: {product} {version}, {role}, {_latency_us(wire):.0f} us a round trip"
    if role == "master":
        yield Finding("ok", "server", text)
    else:
        yield Finding("error", "server", f"{text}; it takes no writes: point url at the primary")
    yield _memory(pool, info)
    yield _persistence(pool, info, wire)


def _info(wire: Wire) -> Mapping[str, str]:
    """Returns INFO as a dict; empty if this user has no right to it."""
    reply = wire.call(b"INFO")
    if not isinstance(reply, bytes):
        return {}
    pairs = (line.partition(":") for line in reply.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}


def _latency_us(wire: Wire) -> float:
    samples = []
    for _ in range(_N_PINGS):
        start = time.perf_counter()
        wire.call(b"PING")
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6


def _memory(pool: Pool, info: Mapping[str, str]) -> Finding:
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    policy = info.get("maxmemory_policy", "unknown")
    text = f"{pool.server}: {used / 1e9:.2f} of {limit / 1e9:.2f} GB used, policy {policy}"
    if not limit:
        return Finding(
            "warning", "memory", f"{pool.server} has no maxmemory: it grows until the system kills "
            "it; set maxmemory and maxmemory-policy allkeys-lru"
        )  # fmt: skip
    if not policy.startswith("allkeys-"):
        return Finding(
            "warning", "memory", f"{text}: when it is full, writes are dropped; set "
            "maxmemory-policy allkeys-lru"
        )  # fmt: skip
    return Finding("ok", "memory", text)


def _persistence(pool: Pool, info: Mapping[str, str], wire: Wire) -> Finding:
    reply = wire.call(b"CONFIG", b"GET", b"save")
    snapshots = reply[1] if isinstance(reply, list) and len(reply) == 2 else b""
    if info.get("aof_enabled") == "1" or snapshots:
        return Finding(
            "warning", "persistence", f"{pool.server} writes the cache to its disk, which costs "
            "memory and stalls; set save '' and appendonly no"
        )  # fmt: skip
    if isinstance(reply, ErrorReply):
        return Finding("ok", "persistence", f"{pool.server} has no append-only file")
    return Finding("ok", "persistence", f"{pool.server} keeps its disk out of it")


def _round_trip(
    backend: StorageBackend, pools: Sequence[Pool], config: RedisConfig
) -> Iterator[Finding]:
    """Writes, reads and removes one object; also asks how much memory it takes.

    Args:
        backend: open.
        pools: its servers.
        config: its settings.
    """
    source = memoryview(bytes(range(256)) * (_PROBE_NBYTES // 256))
    target = memoryview(bytearray(_PROBE_NBYTES))
    start = time.perf_counter()
    n_stored = backend.batch_set([_PROBE_KEY], [(source,)])
    written = time.perf_counter()
    n_filled = backend.batch_get([_PROBE_KEY], [(target,)])
    read = time.perf_counter()
    taken_nbytes = _taken_nbytes(pools, (config.key_prefix + _PROBE_KEY).encode())
    backend.delete([_PROBE_KEY])
    if not n_stored:
        yield Finding("error", "bandwidth", "the server had no room for an object of 4 MiB")
        return
    if not n_filled or source != target:
        yield Finding("error", "bandwidth", "what was read is not what was written")
        return
    write_rate, read_rate = (_PROBE_NBYTES / t / 1e6 for t in (written - start, read - written))
    yield Finding(
        "ok", "bandwidth", f"4 MiB written at {write_rate:.0f} and read at {read_rate:.0f} MB/s"
    )
    if taken_nbytes:
        yield _overhead(taken_nbytes / _PROBE_NBYTES)


def _overhead(times: float) -> Finding:
    """What a page takes of ``maxmemory``."""
    text = f"an object of 4 MiB takes {times:.2f} times its bytes of the server's memory"
    if times > _ROUNDED_UP:
        text += (
            ": the allocator rounds a page of 2^n bytes and its header up to the next size; reckon "
            "with it in maxmemory (hicache size)"
        )
    return Finding("ok", "overhead", text)


def _taken_nbytes(pools: Sequence[Pool], key: bytes) -> int:
    """The memory of an object; 0 if no server tells."""
    for pool in pools:
        with pool.lease("examine") as wire:
            reply = wire.call(b"MEMORY", b"USAGE", key)
        if isinstance(reply, int):
            return reply
    return 0
