"""The settings of KV events, checked without opening anything. ``docs/kv-events.md``."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hicache_core.errors import ConfigError

Count = Annotated[int, Field(ge=0)]
_ENDPOINT = re.compile(r"tcp://(?:\[[^\]]+\]|[^:/\s]+):(?P<port>\d+|\*)|(?:ipc|inproc)://\S+")
_MAX_PORT = 65535


@dataclass(frozen=True)
class EventsConfig:
    """Where and how KV events are published.

    Attributes:
        endpoint: ZMQ address of the PUB socket. ``dp_rank`` is added to a TCP port.
        replay_endpoint: ZMQ address for subscribers that missed something; None for none.
            ``dp_rank`` is added to its port too.
        topic: first frame of every message.
        format: each event as a ``map``, as SGLang 0.5.23 and vLLM 0.32 send it, or as an ``array``
            of the same fields for readers that know the older form only.
        hwm: messages kept for a slow subscriber before it loses some.
        buffer_steps: batches kept for replay.
        buffer_nbytes: bytes kept for replay.
        queue_runs: runs of pages that may wait for the publisher's thread.
        dp_rank: data-parallel rank of this cache.
        bind: False to connect to subscribers that bind, instead.
        groups: whether units of groups of layers are told, too. A reader that does not know
            ``group_idx`` would take them for full pages.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    format: Literal["map", "array"] = "map"
    hwm: Count = 100_000
    buffer_steps: Count = 10_000
    buffer_nbytes: Count = 256 << 20
    queue_runs: Count = 100_000
    dp_rank: Count = 0
    bind: bool = True
    groups: bool = True


def events_config(settings: Mapping[str, Any]) -> EventsConfig | None:
    """Reads the settings of KV events, under our names or those of SGLang and vLLM.

    Opens nothing: whether an address is in use shows when the cache is opened.

    Args:
        settings: fields of ``EventsConfig``. Also accepted: ``publisher`` (``zmq`` or ``null``),
            ``enable_kv_cache_events``, ``max_queue_size`` for ``queue_runs``, and SGLang's values
            ``default`` and ``dynamo`` of ``format``, which mean maps.

    Returns:
        None if no events are wanted.

    Raises:
        ConfigError: a setting is unknown or wrong, or the packages are not installed.
    """
    given = dict(settings)
    if not given or not _is_wanted(given):
        return None
    if any(importlib.util.find_spec(name) is None for name in ("zmq", "msgpack")):
        raise ConfigError("kv_events_config needs ZMQ: pip install 'hicache-core[events]'")
    if "max_queue_size" in given:
        given.setdefault("queue_runs", given.pop("max_queue_size"))
    if given.get("format") in ("default", "dynamo"):
        given["format"] = "map"
    try:
        config = TypeAdapter(EventsConfig).validate_python(given)
    except ValidationError as error:
        raise ConfigError(f"kv_events_config: {_said(error)}") from error
    for name in ("endpoint", "replay_endpoint"):
        _check_address(name, getattr(config, name), config.dp_rank)
    return config


def advertised(config: EventsConfig | None, page_size: int) -> dict[str, object] | None:
    """Where routers find the events, as SGLang's ``/server_info`` tells it under ``kv_events``.

    Args:
        config: of the events; None if there are none.
        page_size: tokens of a block.

    Returns:
        None if a router cannot connect: no events, no fixed TCP port, or a publisher that connects
        by itself.
    """
    found = None if config is None or not config.bind else _tcp(config.endpoint, config.dp_rank)
    if config is None or found is None:
        return None
    host, port = found
    told: dict[str, object] = {
        "publisher": "zmq",
        "endpoint_host": host,
        "endpoint_port_base": port,
        "topic": config.topic,
        "block_size": page_size,
        "dp_size": 1,
    }
    replay = config.replay_endpoint and _tcp(config.replay_endpoint, config.dp_rank)
    if replay:
        told["replay_endpoint_port_base"] = replay[1]
    return told


def _tcp(address: str, dp_rank: int) -> tuple[str, int] | None:
    """Host and port of a TCP address, the rank added; None for others and for any free port."""
    match = _ENDPOINT.fullmatch(address)
    port = match and match["port"]
    if not port or not port.isdigit():
        return None
    return address.removeprefix("tcp://").rpartition(":")[0], int(port) + dp_rank


def _is_wanted(given: dict[str, Any]) -> bool:
    """Removes the switches of SGLang and vLLM from ``given``; whether both allow events."""
    publisher = given.pop("publisher", "zmq")
    if publisher not in ("zmq", "null", None):
        raise ConfigError(f"kv_events_config: publisher = {publisher!r}; allowed: zmq, null")
    enabled = given.pop("enable_kv_cache_events", True)
    if not isinstance(enabled, bool):
        raise ConfigError(
            f"kv_events_config: enable_kv_cache_events = {enabled!r}; allowed: true, false"
        )
    return publisher == "zmq" and enabled


def _said(error: ValidationError) -> str:
    """The first error, in words."""
    detail = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, detail["loc"]))
    if detail["type"] == "unexpected_keyword_argument":
        known = ", ".join(sorted(field.name for field in fields(EventsConfig)))
        return f"unknown setting {name!r}; the settings are: {known}"
    return f"{name} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _check_address(name: str, address: str | None, dp_rank: int) -> None:
    if address is None:
        return
    match = _ENDPOINT.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"kv_events_config: {name} = {address!r} is not a ZMQ address; "
            "write tcp://127.0.0.1:5557, tcp://*:5557 or ipc:///path"
        )
    port = match["port"]
    if port is not None and port.isdigit() and int(port) + dp_rank > _MAX_PORT:
        raise ConfigError(
            f"kv_events_config: {name} = {address!r} with dp_rank {dp_rank} gives port "
            f"{int(port) + dp_rank}; the largest port is {_MAX_PORT}"
        )
