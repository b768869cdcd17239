"""What operators see of a real cache is what happened in it."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from hicache_core.build.cache import HiCache
from hicache_core.cli.status import command
from hicache_core.config.settings import HiCacheConfig
from hicache_core.controller.controller import Controller
from hicache_core.controller.parts import Parts
from hicache_core.errors import ConfigError, RankLost
from hicache_core.kv.keys import pack_tokens
from hicache_core.observe import usage
from hicache_core.observe.http import StatusServer
from hicache_core.pools.device import DevicePool
from hicache_core.ranks.base import SingleRank
from tests.page_path.world import PAGE_SIZE, SPEC, World, ids, make_world


@pytest.fixture
def world(worlds: list[World]) -> World:
    """A cache with a status server, after a cold request, a device hit and a host hit."""
    made = make_world(
        storage={"share": uuid.uuid4().hex}, hicache_status_port=0, metrics_prefix="sglang:"
    )
    worlds.append(made)
    made.request(ids(33))
    made.request(ids(33))
    made.cache.flush(10.0)
    made.flush_device()
    made.request(ids(33))
    made.cache.flush(10.0)
    return made


def url(world: World) -> str:
    found = world.cache.status_url
    assert found is not None
    return found


def fetched(world: World, path: str) -> Any:
    with urlopen(url(world) + path, timeout=10) as response:
        return json.load(response)


def series(world: World) -> dict[tuple[str, str], float]:
    """Every sample by its name and the values of its labels."""
    with urlopen(url(world) + "/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_what_happened(world: World) -> None:
    seen = series(world)
    assert seen["sglang:cached_tokens_total", "device"] == 32
    assert seen["sglang:cached_tokens_total", "host"] == 32
    assert seen["sglang:missed_tokens_total", ""] == 33 + 1 + 1
    assert seen["sglang:backuped_tokens_total", ""] == 32
    assert seen["sglang:load_back_tokens_total", "kv"] == 32
    assert seen["sglang:storage_breaker_state", "memory,closed"] == 1
    assert seen["sglang:storage_operation_seconds_count", "memory,set"] >= 1
    assert seen["sglang:evicted_pages_total", "evicted,device"] == 8
    assert seen["sglang:pool_pages", "free,device"] == 8
    assert seen["sglang:storage_bytes_in_flight", "write"] == 0


def test_status_and_explain_are_served(world: World) -> None:
    status = fetched(world, "/hicache/status")
    assert status["snapshot"]["hit_tokens"] == {"device": 32, "host": 32, "storage": 0}
    assert [backend["name"] for backend in status["snapshot"]["backends"]] == ["memory"]
    explained = fetched(world, "/hicache/explain/request-3")
    assert (explained["host_tokens"], explained["reason"]) == (32, "none")
    with pytest.raises(HTTPError, match="404") as caught:
        fetched(world, "/hicache/explain/nobody")
    caught.value.close()


def test_hicache_status_prints_a_running_cache(world: World) -> None:
    shown = CliRunner().invoke(command, [url(world)])
    assert shown.exit_code == 0, shown.output
    assert "memory" in shown.output
    assert "closed" in shown.output


def test_pool_pages_add_up(world: World) -> None:
    pages = {key[1]: value for key, value in series(world).items() if key[0].endswith("pool_pages")}
    assert sum(n for state, n in pages.items() if state.endswith("device")) == 16


def test_events_without_their_package_or_with_a_wrong_setting_are_config_errors() -> None:
    config = HiCacheConfig(page_size=PAGE_SIZE, kv_events_config={"endpont": "tcp://127.0.0.1:*"})
    with pytest.raises(ConfigError, match="unknown setting 'endpont'"):
        HiCache(config, SPEC, DevicePool(SPEC, PAGE_SIZE, 4))


def test_an_address_that_is_taken_is_a_config_error_and_leaves_nothing_running() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = HiCacheConfig(page_size=PAGE_SIZE, hicache_status_port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="status server cannot listen"):
            HiCache(config, SPEC, DevicePool(SPEC, PAGE_SIZE, 4))


def test_events_are_published_by_the_cache_itself(worlds: list[World]) -> None:
    made = make_world(kv_events_config={"endpoint": "tcp://127.0.0.1:*"}, hicache_status_port=0)
    worlds.append(made)
    made.request(ids(33))
    made.cache.flush(10.0)
    sent = fetched(made, "/hicache/status")["snapshot"]["events"]
    assert sent["sent_batches"] + sent["queued_runs"] > 0


def test_what_storage_holds_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "EVERY_S", 0.1)
    made = make_world(storage={"share": uuid.uuid4().hex}, hicache_status_port=0)
    made.request(ids(33))
    made.cache.flush(10.0)
    end = time.monotonic() + 20
    shown: list[float] = []
    while not shown:
        assert time.monotonic() < end
        shown = [n for key, n in series(made).items() if "storage_usage_bytes" in key[0]]
    assert shown[0] >= 8 * 64
    made.close()


def test_the_last_token_of_a_prompt_counts_as_computed(worlds: list[World]) -> None:
    """An engine looks up all tokens but the last: cached and missed are the prompt all the same."""
    made = make_world()
    worlds.append(made)
    made.cache.match_prefix(pack_tokens(ids(16)), request_id="one", n_behind=1)
    assert made.cache.counters.missed_tokens == 17
    explanation = made.cache.explain("one")
    assert explanation is not None
    assert (explanation.n_tokens, explanation.missed_tokens) == (17, 17)


class OtherRankFails(SingleRank):
    """As if a second rank could not open its cache."""

    world_size = 2

    def agree_min(self, values: Sequence[int]) -> list[int]:
        return [0] if list(values) == [1] else list(values)

    def gather(self, text: str) -> list[str]:
        return [text, text]


def test_a_cache_that_another_rank_cannot_open_answers_nobody_and_leaves_nothing_running() -> None:
    """The fixture that watches for leaks finds threads, sockets and open caches."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = HiCacheConfig(
        page_size=PAGE_SIZE, hicache_storage_backend="memory", hicache_status_port=port
    )
    with pytest.raises(RankLost, match="another rank could not open its cache"):
        HiCache(config, SPEC, DevicePool(SPEC, PAGE_SIZE, 4), ranks=OtherRankFails())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_scrape_at_the_first_moment_of_the_status_server_sees_a_whole_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server answers on its own thread before the constructor of the cache has returned."""
    answers: list[int] = []
    start = StatusServer.open

    def open_and_scrape(server: StatusServer) -> None:
        start(server)
        for path in ("/metrics", "/hicache/status", "/hicache/requests", "/hicache/history"):
            with urlopen(server.url + path, timeout=20) as response:
                answers.append(response.status)

    monkeypatch.setattr(StatusServer, "open", open_and_scrape)
    make_world(storage={"share": uuid.uuid4().hex}, hicache_status_port=0).close()
    assert answers == [200] * 4


def test_who_asks_while_a_cache_is_being_built_is_answered_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers: list[int] = []

    def ask() -> None:
        with urlopen(f"http://127.0.0.1:{port}/hicache/status", timeout=20) as response:
            answers.append(response.status)

    asking = threading.Thread(target=ask)
    make = Controller.__init__

    def slow(cache: Controller, parts: Parts) -> None:
        asking.start()
        asking.join(0.3)  # it waits
        make(cache, parts)

    monkeypatch.setattr(Controller, "__init__", slow)
    world = make_world(hicache_status_port=port)
    asking.join()
    world.close()
    assert answers == [200]
