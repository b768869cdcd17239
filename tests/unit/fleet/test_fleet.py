"""A simulated fleet: what is conserved, how time passes, who gets a request, who shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from hicache_core.bench.traces import TraceRequest
from hicache_core.errors import ConfigError
from hicache_core.fleet.result import Result
from hicache_core.fleet.routing import make_router
from hicache_core.fleet.setting import Prices, Setting, Speed, StorageProfile
from hicache_core.fleet.simulation import Fleet, Load
from hicache_core.fleet.store import Store
from hicache_core.fleet.sweep import combinations, run_all
from tests.unit.fleet.exact import PAGE, TOKEN_NBYTES, gb, generated, setting

SPEED = Speed(request_s=0.5, token_s=0.01, decode_s=0.25)


def run(given: Setting, requests: Sequence[TraceRequest], load: Load | None = None) -> Result:
    """Simulates, and checks all pages afterwards."""
    fleet = Fleet(given, requests, load or Load())
    while fleet.step():
        pass
    for server in fleet.servers:
        server.cache.check_integrity()
        assert (
            server.cache.parts.tree.n_evictable_device_pages
            == server.cache.parts.tree.n_device_pages
        )
    return fleet.result()


def prompt(at_s: float, n_tokens: int, *blocks: str, output: int = 1) -> TraceRequest:
    return TraceRequest(at_s, n_tokens, output, blocks, PAGE)


SETTINGS = {
    "device": setting(60),
    "host": setting(60, 400),
    "write_back": setting(60, 400, write_policy="write_back"),
    "selective": setting(60, 400, write_policy="write_through_selective"),
    "storage": setting(60, 100, 4000, servers=2, router="round-robin"),
    "small store": setting(60, 100, 300, servers=2, router="load"),
    "best_effort": setting(60, 100, 4000, servers=3, prefetch_policy="best_effort"),
    "timeout": setting(60, 100, 4000, servers=2, prefetch_policy="timeout", router="round-robin"),
    "cost_aware": setting(60, 100, 4000, servers=2, admission="cost_aware", router="round-robin"),
    "arc": setting(60, 200, eviction="arc"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_hits_and_computed_tokens_make_up_the_prompts(name: str) -> None:
    """However busy the servers are, and whatever the policies: each request ends, too."""
    requests = generated(300)
    found = run(SETTINGS[name], requests, Load(time_scale=0.2))
    assert len(found.served) == len(requests)
    n_hits = sum(found.hit_tokens.values())
    assert n_hits + sum(found.n_computed_tokens) == sum(one.input_length for one in requests)
    assert n_hits == sum(one.cached.total for one in found.served) > 0


@pytest.mark.parametrize("name", ["storage", "timeout"])
def test_the_same_seed_gives_the_same_result(name: str) -> None:
    load = Load(request_rate=5.0, seed=3)
    first, second = (run(SETTINGS[name], generated(200), load) for _ in range(2))
    assert first == second
    assert first != run(SETTINGS[name], generated(200), replace(load, seed=4))


def test_a_sweep_gives_in_processes_what_it_gives_in_turn() -> None:
    settings = combinations(setting(60), {"host_gb": [0.0, gb(200)], "router": ["load"]})
    traces = [generated(40), generated(40, seed=2)]
    in_turn = list(run_all(settings, traces, Load(), 1))
    assert list(run_all(settings, traces, Load(), 2)) == in_turn
    assert [one.setting.host_gb for one in in_turn] == [0.0, gb(200)] * 2


# Time.


def test_a_request_alone_takes_the_time_of_the_formula() -> None:
    found = run(setting(20, speed=SPEED), [prompt(3.0, 100, "a", "b", output=5)])
    (one,) = found.served
    assert one.arrived_s == 0.0
    assert one.first_s == pytest.approx(0.5 + 100 * 0.01)
    assert one.finished_s == pytest.approx(one.first_s + 4 * 0.25)


def test_attention_takes_longer_behind_a_longer_prefix() -> None:
    speed = Speed(pair_s=1e-3, token_s=0.0, request_s=0.0)
    assert speed.prefill_s(10, 0) == pytest.approx(0.05)
    assert speed.prefill_s(10, 100) == pytest.approx(1.05)
    assert speed.prefill_s(10, 0) + speed.prefill_s(10, 10) == pytest.approx(speed.prefill_s(20, 0))


def test_a_second_request_waits_for_the_first_and_decodes_with_it() -> None:
    """Both come at once: prompts one after the other, then each step gives both a token."""
    speed = replace(SPEED, sequence_s=0.1)
    requests = [prompt(0.0, 100, "a", "b", output=4), prompt(0.0, 100, "c", "d", output=4)]
    first, second = run(setting(20, speed=speed), requests).served
    assert first.first_s == pytest.approx(1.5)
    assert second.first_s == pytest.approx(3.0)
    assert first.finished_s == second.finished_s == pytest.approx(3.0 + 3 * (0.25 + 2 * 0.1))


def test_a_prompt_that_comes_during_an_answer_starts_after_the_present_step() -> None:
    requests = [prompt(0.0, 100, "a", "b", output=41), prompt(2.1, 100, "c", "d")]
    found = run(setting(20, speed=SPEED), requests)
    late = next(one for one in found.served if one.number == 1)
    assert late.first_s == pytest.approx(2.25 + 1.5)
    other = next(one for one in found.served if one.number == 0)
    assert other.finished_s == pytest.approx(1.5 + 40 * 0.25 + 1.5)


def test_a_load_from_the_host_overlaps_with_computation_layer_by_layer() -> None:
    """Three pages come from the host in 3 s; the last layer computes after its part has come."""
    nbytes_per_s = PAGE * TOKEN_NBYTES  # a page a second
    given = setting(5, 50, speed=SPEED, layers=4, bus_nbytes_per_s=nbytes_per_s)
    own, other = ("a", "b", "c", "d"), ("e", "f", "g", "h", "i")
    requests = [
        prompt(0.0, 4 * PAGE, *own),
        prompt(100.0, 5 * PAGE, *other),
        prompt(200.0, 4 * PAGE, *own),
    ]
    found = run(given, requests)
    again = found.served[2]
    assert again.cached.host == 3 * PAGE
    compute_s = 0.5 + PAGE * 0.01
    assert again.first_s - 200 == pytest.approx(3.0 + compute_s / 4)


def test_requests_of_a_session_wait_for_each_other() -> None:
    chat = [replace(prompt(0.0, 100, f"{n}", "x"), session="s") for n in range(3)]
    served = run(setting(20, speed=SPEED), chat).served
    assert [one.arrived_s for one in served] == pytest.approx([0.0, 1.5, 3.0])


def test_no_more_requests_run_than_clients_send() -> None:
    requests = [prompt(0.0, 100, f"{n}", "x") for n in range(4)]
    served = run(setting(40, speed=SPEED), requests, Load(max_parallel=2)).served
    assert [one.arrived_s for one in served] == pytest.approx([0.0, 0.0, 1.5, 3.0])


def test_arrivals_at_a_rate_replace_the_times_of_a_trace() -> None:
    load = Load(request_rate=10.0)
    served = run(setting(60), [prompt(0.0, 100, f"{n}", "x") for n in range(500)], load).served
    assert max(one.arrived_s for one in served) == pytest.approx(50.0, rel=0.2)


def test_a_request_larger_than_a_device_is_refused_and_the_next_of_its_session_sent() -> None:
    chat = [
        replace(prompt(0.0, 700, *"abcdefghijk"), session="s"),
        replace(prompt(0.0, 100, "l", "m"), session="s"),
    ]
    found = run(setting(4), chat)
    assert (found.n_refused, len(found.served)) == (1, 1)


def test_what_was_said_in_a_conversation_is_a_hit_in_its_next_turn() -> None:
    """Of a trace with texts the answers are known, so their KV is used again."""
    words = [f"w{n}" for n in range(4 * PAGE)]
    turns = [
        TraceRequest(0.0, 2 * PAGE, PAGE + 1, session="s", text=" ".join(words[: 2 * PAGE])),
        TraceRequest(0.0, 4 * PAGE, 1, session="s", text=" ".join(words)),
    ]
    assert run(setting(20), turns).served[1].cached.device == 3 * PAGE


# Servers.


def test_the_prefix_router_keeps_conversations_where_they_were() -> None:
    """Round-robin takes every turn to another server, which has not seen the others."""
    requests = [
        prompt(10.0 * turn + n, (turn + 1) * 4 * PAGE, *(f"{n}/{k}" for k in range(4 * turn + 4)))
        for turn in range(4)
        for n in range(3)
    ]
    by_prefix = run(setting(200, servers=4, router="prefix"), requests)
    in_turn = run(setting(200, servers=4, router="round-robin"), requests)
    servers = {(one.number % 3, one.server) for one in by_prefix.served}
    assert len(servers) == 3
    assert by_prefix.hit_rate > in_turn.hit_rate == 0.0


def test_the_load_router_gives_a_request_to_the_idlest_server() -> None:
    router = make_router("load", 2)
    assert [router.pick(b"", 10), router.pick(b"", 1), router.pick(b"", 1)] == [0, 1, 1]
    router.ended(0, 10)
    assert router.pick(b"", 1) == 0


def test_an_unknown_router_is_an_error_that_names_the_others() -> None:
    with pytest.raises(ConfigError, match=r"'fast'.*prefix, load, round-robin"):
        make_router("fast", 1)


def test_more_servers_shorten_the_wait() -> None:
    requests = [prompt(0.0, 100, f"{n}", "x") for n in range(8)]
    waits = []
    for servers in (1, 2, 4):
        found = run(setting(60, speed=SPEED, servers=servers, router="load"), requests)
        assert found.as_json()["requests_by_server"] == [8 // servers] * servers
        waits.append(found.as_json()["ttft_s"]["p99"])
    assert waits == pytest.approx([12.0, 6.0, 3.0])


# Storage.


def test_a_server_finds_in_storage_what_another_one_computed() -> None:
    blocks = [f"{n}" for n in range(8)]
    requests = [prompt(0.0, 8 * PAGE, *blocks), prompt(100.0, 8 * PAGE, *blocks)]
    given = setting(20, 20, 100, servers=2, router="round-robin", prefetch_threshold=PAGE)
    found = run(given, requests)
    assert found.hit_tokens == {"device": 0, "host": 0, "storage": 7 * PAGE}
    nbytes = PAGE * TOKEN_NBYTES
    assert found.moved_nbytes["host_to_storage"] == 8 * nbytes  # the second has nothing new
    assert found.moved_nbytes["storage_to_host"] == 7 * nbytes
    assert found.storage_nbytes == 8 * nbytes


def test_a_slow_store_delays_who_waits_for_it() -> None:
    blocks = [f"{n}" for n in range(8)]
    requests = [prompt(0.0, 8 * PAGE, *blocks), prompt(100.0, 8 * PAGE, *blocks)]
    slow = StorageProfile(1.0, 0.5, 0.0, read_nbytes_per_s=PAGE * TOKEN_NBYTES)
    given = setting(
        20, 20, 100, servers=2, router="round-robin", prefetch_threshold=PAGE, storage=slow,
        speed=SPEED, bus_nbytes_per_s=1e15,
    )  # fmt: skip
    waits = run(given, requests).served[1]
    assert waits.first_s - 100 == pytest.approx(1.0 + 0.5 + 7.0 + 0.5 + PAGE * 0.01)
    goes_on = run(replace(given, prefetch_policy="best_effort"), requests).served[1]
    assert goes_on.cached.total == 0
    assert goes_on.first_s - 100 == pytest.approx(0.5 + 8 * PAGE * 0.01)


def test_a_store_with_a_limit_drops_what_was_used_longest_ago() -> None:
    store = Store(3, math.inf)
    store.write([1, 2, 3], 1.0)
    assert store.read([1], 2.0) == 1
    store.write([4], 3.0)
    assert [store.n_leading([name], 9.0) for name in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert (store.n_pages, store.n_evicted) == (3, 1)


def test_a_page_is_in_a_store_from_the_end_of_its_write_on() -> None:
    store = Store(None, math.inf)
    store.write([1], 5.0)
    assert store.n_leading([1], 4.9) == 0
    assert store.n_leading([1], 5.0) == 1


# Results.


def test_what_a_fleet_costs() -> None:
    found = run(
        setting(20, 100, 100, servers=2, speed=SPEED),
        [prompt(0.0, 100, "a", "b"), prompt(3600.0 - 1.5, 100, "c", "d")],
    )
    assert found.duration_s == pytest.approx(3600.0)
    assert found.cost(Prices(server_hour=3.0)) == pytest.approx(6.0)
    assert found.cost(Prices(host_gb_hour=1.0)) == pytest.approx(2 * gb(100))
    assert found.cost(Prices(storage_gb_hour=1.0)) == pytest.approx(gb(100))
    summary = found.as_json(Prices(server_hour=3.0))
    assert summary["cost_per_million_tokens"] == pytest.approx(6e6 / 202)
    assert "cost" not in found.as_json()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"servers": 0}, "at least 1"),
        ({"device_gb": 0.001}, "no room for a page of 8,388,608 bytes"),
        ({"storage_gb": 10.0}, "storage needs a host tier"),
        ({"host_gb": math.inf}, "host_gb is inf"),
    ],
)
def test_a_fleet_that_cannot_be_is_a_clear_error(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Setting(**values)  # type: ignore[arg-type]
