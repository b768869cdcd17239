"""Settings of the ``mooncake`` backend: config keys first, then Mooncake's environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from hicache_core.plugin.backends import ConnectTimeout, Nbytes, Seconds, parse_nbytes
from hicache_core.storage.base import BackendConfig

NbytesOrNone = Annotated[int, BeforeValidator(parse_nbytes), Field(ge=0)]
"""A number of bytes, also as text with a unit; 0 is allowed."""


def _environment(name: str, default: str) -> Callable[[], str]:
    """Returns a default that is read from the environment when the config is made."""
    return lambda: os.environ.get(name, default)


def split_address(address: str) -> tuple[str, int] | None:
    """Returns host and port of ``host:port``; None for a cluster of masters (``etcd://…``).

    Raises:
        ValueError: the text is neither.
    """
    if "://" in address:
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"{address!r} is not an address of a mooncake_master; set master_server_address or "
            "MOONCAKE_MASTER to host:port, for example 127.0.0.1:50051"
        )
    return host.strip("[]"), int(port)


class MooncakeConfig(BackendConfig):
    """Settings of the ``mooncake`` backend.

    A setting that is not given is read from its environment variable, then from the default.
    """

    master_server_address: str = Field(
        default_factory=_environment("MOONCAKE_MASTER", ""),
        validate_default=True,
        description="host:port of the mooncake_master, or etcd://… of several; MOONCAKE_MASTER",
    )
    metadata_server: str = Field(
        default_factory=_environment("MOONCAKE_TE_META_DATA_SERVER", "P2PHANDSHAKE"),
        description="where transfer engines find each other: P2PHANDSHAKE (no server needed) or a "
        "URL; MOONCAKE_TE_META_DATA_SERVER",
    )
    local_hostname: str | None = Field(
        default_factory=lambda: os.environ.get("MOONCAKE_LOCAL_HOSTNAME"),
        description="name or address under which other servers reach this one; the address that "
        "faces the master if not set; MOONCAKE_LOCAL_HOSTNAME",
    )
    global_segment_size: NbytesOrNone = Field(
        default_factory=_environment("MOONCAKE_GLOBAL_SEGMENT_SIZE", "4GiB"),
        validate_default=True,
        description="memory that this process lends to the store, bytes or text like '64GiB'; 0 "
        "lends none; MOONCAKE_GLOBAL_SEGMENT_SIZE",
    )
    protocol: str = Field(
        default_factory=_environment("MOONCAKE_PROTOCOL", "tcp"),
        description="transport: rdma in production, tcp anywhere; MOONCAKE_PROTOCOL",
    )
    device_name: str = Field(
        default_factory=_environment("MOONCAKE_DEVICE", ""),
        description="RDMA devices, separated by commas; empty lets Mooncake choose; "
        "MOONCAKE_DEVICE",
    )
    master_metrics_port: int = Field(
        default=9003,
        gt=0,
        lt=65536,
        description="the master's HTTP port; listing, usage and `hicache doctor` use it",
    )
    tenant_id: str = Field(default="default", min_length=1, description="the store's tenant")
    replica_num: int = Field(default=1, ge=1, description="copies of every object")
    soft_pin: bool = Field(
        default=False, description="objects are evicted only when no other can be"
    )
    soft_pin_ttl_s: Seconds | None = Field(
        default=None, description="how long a soft pin holds; the master's default if not set"
    )
    preferred_segment: str | None = Field(
        default=None, description="segment (host:port) that new objects go to while it has room"
    )
    connect_timeout_s: ConnectTimeout = 1.0
    setup_timeout_s: Seconds = Field(
        default=10.0, description="limit for the trial set-up, after which open() fails"
    )
    rpc_timeout_s: Seconds = Field(
        default=2.0, description="limit for one answer of the master, or of another server"
    )
    retry_interval_s: Seconds = Field(
        default=1.0, description="how long calls fail at once after the master was lost"
    )
    ready_wait_s: Seconds = Field(
        default=0.5,
        description="how long a write waits for another process that is writing the same object, "
        "before it counts as dropped",
    )
    max_call_nbytes: Nbytes = Field(
        default=128 * 2**20,
        description="maximum bytes of one client call; keeps reads shorter than their lease",
    )
    require_registered: bool | None = Field(
        default=None,
        description="whether a page outside registered memory is refused (true) or copied through "
        "the staging buffer (false); if not set: refused as soon as memory was registered",
    )
    staging_nbytes: Nbytes = Field(
        default=64 * 2**20,
        description="maximum size of the registered buffer for memory that is not registered; "
        "grows when needed",
    )

    @field_validator("master_server_address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        split_address(value)
        return value
