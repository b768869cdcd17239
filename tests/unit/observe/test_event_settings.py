"""The settings of KV events: ours, and those of SGLang and vLLM where they mean the same."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from hicache_core.errors import ConfigError
from hicache_core.observe.event_settings import EventsConfig, advertised, events_config


@pytest.mark.parametrize(
    "given",
    [
        {"publisher": "zmq", "topic": "kv"},  # SGLang's documents
        {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv"},  # vLLM's
        {"topic": "kv", "format": "dynamo"},
        {"topic": "kv", "format": "default"},
        {"topic": "kv", "max_queue_size": 100_000},
    ],
)
def test_settings_of_the_engines_are_taken(given: dict[str, Any]) -> None:
    assert events_config(given) == EventsConfig(topic="kv")


def test_a_queue_size_of_the_engines_is_ours() -> None:
    config = events_config({"max_queue_size": 7})
    assert config is not None
    assert config.queue_runs == 7


@pytest.mark.parametrize(
    "given",
    [{}, {"publisher": "null", "topic": "kv"}, {"enable_kv_cache_events": False, "hwm": 1}],
)
def test_no_events_are_wanted(given: dict[str, Any]) -> None:
    assert events_config(given) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"endpont": "tcp://*:1"}, "unknown setting 'endpont'; the settings are: bind, buffer"),
        ({"publisher": "kafka"}, "publisher = 'kafka'; allowed: zmq, null"),
        ({"enable_kv_cache_events": "yes"}, "enable_kv_cache_events = 'yes'; allowed: true, false"),
        ({"format": "json"}, "format = 'json': input should be 'map' or 'array'"),
        ({"hwm": "many"}, "hwm = 'many': input should be a valid integer"),
        ({"queue_runs": -1}, "queue_runs = -1: input should be greater than or equal to 0"),
        ({"endpoint": "5557"}, "endpoint = '5557' is not a ZMQ address"),
        ({"replay_endpoint": "tcp://host"}, "replay_endpoint = 'tcp://host' is not a ZMQ address"),
        ({"endpoint": "tcp://*:65535", "dp_rank": 1}, "gives port 65536; the largest port is"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        events_config(given)
    assert said in str(caught.value)


@pytest.mark.parametrize("address", ["tcp://*:5557", "tcp://[::1]:0", "tcp://eth0:*", "ipc:///a"])
def test_addresses_of_zmq_are_taken(address: str) -> None:
    config = events_config({"endpoint": address, "replay_endpoint": address})
    assert config is not None
    assert config.endpoint == config.replay_endpoint == address


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"hicache-core\[events\]"):
        events_config({"topic": "kv"})


@pytest.mark.parametrize(
    ("given", "host", "port", "replay"),
    [
        ({"endpoint": "tcp://*:5557"}, "*", 5557, None),
        ({"endpoint": "tcp://[::]:5557", "dp_rank": 2}, "[::]", 5559, None),
        (
            {"endpoint": "tcp://10.0.0.1:1", "replay_endpoint": "tcp://*:9", "dp_rank": 1},
            "10.0.0.1",
            2,
            10,
        ),
        ({"endpoint": "tcp://*:7", "replay_endpoint": "tcp://*:*"}, "*", 7, None),
    ],
)
def test_routers_are_told_host_and_port_of_this_rank(
    given: dict[str, Any], host: str, port: int, replay: int | None
) -> None:
    told = advertised(EventsConfig(**given), 16)
    assert told is not None
    assert (told["endpoint_host"], told["endpoint_port_base"]) == (host, port)
    assert told.get("replay_endpoint_port_base") == replay
    assert (told["block_size"], told["dp_size"]) == (16, 1)


@pytest.mark.parametrize(
    "config",
    [
        None,
        EventsConfig(endpoint="ipc:///tmp/events"),
        EventsConfig(endpoint="tcp://*:*"),
        EventsConfig(bind=False),
    ],
)
def test_routers_are_told_nothing_where_they_cannot_connect(config: EventsConfig | None) -> None:
    assert advertised(config, 16) is None
