"""The checks of `hicache doctor mooncake`."""

from __future__ import annotations

import ctypes
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

from hicache_core.errors import BackendError
from hicache_core.storage.base import Finding
from hicache_mooncake.client import Client
from hicache_mooncake.config import split_address
from hicache_mooncake.errors import OK, OUTAGES

DISTRIBUTIONS = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
PROBE_KEY = "hicache/doctor"
SHORT_LEASE_S = 0.3
INFINIBAND = Path("/sys/class/infiniband")


def diagnose(client: Client, stats: Mapping[str, float]) -> Iterator[Finding]:
    """Findings, most basic first; one that is an error ends them."""
    yield _library()
    try:
        yield Finding(
            "ok",
            "master",
            f"{client.config.master_server_address} answers in {client.ping_s() * 1e3:.2f} ms",
        )
        yield _admin(client)
        yield _transport(client)
        yield from _memory(client, stats)
        yield _lease(client, stats)
    except BackendError as error:
        yield Finding("error", "master", str(error))


def _library() -> Finding:
    for name in DISTRIBUTIONS:
        try:
            return Finding("ok", "library", f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return Finding(
        "warning",
        "library",
        "mooncake.store loads but belongs to no known wheel; this plugin is tested with 0.3.13",
    )


def _admin(client: Client) -> Finding:
    address = split_address(client.config.master_server_address)
    if address is None:
        return Finding("ok", "master health", "not checked: several masters")
    url = f"http://{address[0]}:{client.config.master_metrics_port}"
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            health = json.load(answer)
        with urllib.request.urlopen(f"{url}/metrics/summary", timeout=2) as answer:
            summary = answer.read().decode(errors="replace")
    except (OSError, ValueError) as error:
        return Finding(
            "warning",
            "master health",
            f"{url} does not answer ({error}); set master_metrics_port to the master's "
            "--metrics_port to see its capacity here",
        )
    level: Literal["ok", "warning"] = "ok" if health.get("service_ready", True) else "warning"
    capacity = summary.partition("Mem Storage:")[2].partition("|")[0].strip()
    return Finding(level, "master health", f"{health.get('status')}; memory {capacity}")


def _transport(client: Client) -> Finding:
    protocol = client.config.protocol
    devices = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if protocol == "tcp" and devices:
        return Finding(
            "warning",
            "transport",
            f"tcp, but this machine has {', '.join(devices)}; set protocol to rdma",
        )
    if protocol == "tcp":
        return Finding("warning", "transport", "tcp moves about 1 GB/s; use rdma in production")
    return Finding("ok", "transport", f"{protocol}; devices {', '.join(devices) or 'none found'}")


def _memory(client: Client, stats: Mapping[str, float]) -> Iterator[Finding]:
    segment = client.config.global_segment_size
    if segment:
        yield Finding("ok", "segment", f"this process lends {segment / 2**30:.2f} GiB")
    else:
        yield Finding(
            "warning",
            "segment",
            "this process lends no memory (global_segment_size is 0); others must",
        )
    if stats["dropped_writes"]:
        yield Finding(
            "warning",
            "room",
            f"{stats['dropped_writes']:.0f} writes were dropped; lend more memory",
        )


def _lease(client: Client, stats: Mapping[str, float]) -> Finding:
    """Writes a probe, leases it, and checks that the lease lasts long enough."""
    if stats.get("misses_leases_expired"):
        return Finding(
            "error",
            "lease",
            f"{stats['misses_leases_expired']:.0f} reads outlived their lease; start the master "
            "with a larger --default_kv_lease_ttl or lower max_call_nbytes",
        )
    probe = ctypes.create_string_buffer(64)
    address = ctypes.addressof(probe)
    with client.using() as store:
        store.register_buffer(address, 64)
        try:
            code = store.batch_put_from([PROBE_KEY], [address], [64], client.replication)[0]
            if code != OK:
                return _no_probe(client, code)
            store.is_exist(PROBE_KEY)
            time.sleep(SHORT_LEASE_S)
            expired = store.remove(PROBE_KEY) == OK
            store.remove(PROBE_KEY, True)
        finally:
            store.unregister_buffer(address)
    if expired:
        return Finding(
            "warning",
            "lease",
            f"shorter than {SHORT_LEASE_S} s, so slow reads will be misses; start the master with "
            "--default_kv_lease_ttl=5000",
        )
    return Finding("ok", "lease", f"longer than {SHORT_LEASE_S} s")


def _no_probe(client: Client, code: int) -> Finding:
    if code in OUTAGES:
        raise client.error(code, "put")
    return Finding(
        "error",
        "round trip",
        f"a write of 64 bytes was refused (code {code}); -200 means that no server lends memory "
        "with room",
    )
