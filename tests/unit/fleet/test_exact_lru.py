"""The hits of a simulated server are those of an exact LRU, to the token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from hicache_core.bench.traces import TraceRequest, read_trace
from hicache_core.fleet.simulation import Load, simulate
from tests.unit.fleet.exact import EXCERPT, PAGE, exact_hits, generated, setting

ONE_BY_ONE = Load(max_parallel=1)


def hits_by_request(found: object) -> list[int]:
    served = sorted(found.served, key=lambda one: one.number)  # type: ignore[attr-defined]
    return [one.cached.total for one in served]


def excerpt(n: int) -> list[TraceRequest]:
    return read_trace(EXCERPT, n)


@pytest.mark.parametrize("pages", [2500, 8000, 200_000])
def test_a_device_hits_what_an_exact_lru_hits_on_a_real_trace(pages: int) -> None:
    requests = excerpt(300)
    found = simulate(setting(pages), requests, ONE_BY_ONE)
    assert found.n_refused == 0
    assert hits_by_request(found) == exact_hits(requests, pages, keeps_tails=True)


@pytest.mark.parametrize("pages", [40, 100, 400, 100_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_device_hits_what_an_exact_lru_hits_on_generated_traces(pages: int, seed: int) -> None:
    requests = generated(400, seed=seed)
    found = simulate(setting(pages), requests, ONE_BY_ONE)
    hits = exact_hits(requests, pages, keeps_tails=True)
    assert hits_by_request(found) == hits
    assert sum(hits) > 0


@pytest.mark.parametrize(("device", "host"), [(40, 300), (100, 2000)])
def test_device_and_host_hit_what_an_exact_lru_of_the_hosts_size_hits(
    device: int, host: int
) -> None:
    """With write_through the host has all that the device has."""
    requests = generated(400)
    found = simulate(setting(device, host), requests, ONE_BY_ONE)
    assert hits_by_request(found) == exact_hits(requests, host, keeps_tails=False)
    assert found.hit_tokens["host"] > 0


def test_without_a_limit_all_pages_that_were_seen_before_are_hits() -> None:
    """Counted on the excerpt's own ids, with pages of its blocks: no tokens are made for it."""
    requests = excerpt(1000)
    seen: set[tuple[str, ...]] = set()
    n_hits = 0
    for one in requests:
        n_usable = (one.input_length - 1) // 512
        n = next((n for n in range(n_usable) if one.blocks[: n + 1] not in seen), n_usable)
        n_hits += 512 * n
        n_whole = one.input_length // 512
        seen.update(one.blocks[: k + 1] for k in range(n_whole))
    given = replace(setting(200_000), page_size=512)
    found = simulate(given, requests, ONE_BY_ONE)
    assert sum(found.hit_tokens.values()) == n_hits
    assert n_hits > 0.2 * sum(one.input_length for one in requests)


def test_more_memory_never_gives_fewer_hits() -> None:
    """The stack property of LRU: a larger cache has all that a smaller one has."""
    requests = generated(400)
    device = [simulate(setting(n), requests, ONE_BY_ONE) for n in (40, 80, 160, 320, 640)]
    host = [simulate(setting(40, n), requests, ONE_BY_ONE) for n in (80, 160, 320, 640)]
    for results in (device, host):
        by_request = [hits_by_request(one) for one in results]
        for smaller, larger in pairwise(by_request):
            assert all(a <= b for a, b in zip(smaller, larger, strict=True))
        assert sum(by_request[0]) < sum(by_request[-1])


def test_hits_are_whole_pages_and_never_the_last_token() -> None:
    same = [TraceRequest(float(n), 4 * PAGE, 1, ("a",), 4 * PAGE) for n in range(3)]
    found = simulate(setting(100), same, ONE_BY_ONE)
    assert hits_by_request(found) == [0, 3 * PAGE, 3 * PAGE]
