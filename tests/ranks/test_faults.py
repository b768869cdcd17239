"""One rank's trouble: all ranks go on alike, with fewer hits and never a wrong byte."""

from __future__ import annotations

import pytest

from tests.ranks.fleet import Fleet, RankFailed
from tests.ranks.test_sharing import COMPUTED, LOADED, PROMPT, stored


def test_a_slow_store_of_one_rank_is_waited_for_by_all(fleet: Fleet, store: str) -> None:
    stored(fleet, store)
    fleet.each("open", store, by_rank={1: {"trouble": {"latency_s": 0.2}}})
    assert fleet.same("request", PROMPT) == LOADED
    fleet.all("close")


def test_when_the_time_is_over_on_one_rank_all_go_on_without(fleet: Fleet, store: str) -> None:
    """The slow rank gets nothing, so nobody does; later its late pages are freed everywhere."""
    stored(fleet, store)
    settings = {
        "hicache_storage_prefetch_policy": "timeout",
        "extra": {"prefetch_timeout_base": 0.3, "prefetch_timeout_per_ki_token": 0.0},
    }
    fleet.each("open", store, by_rank={1: {"trouble": {"latency_s": 1.0}}}, **settings)
    assert fleet.same("request", PROMPT) == COMPUTED
    fleet.all("trouble")
    assert fleet.same("forget")
    fleet.all("close")


def test_best_effort_waits_for_no_rank(fleet: Fleet, store: str) -> None:
    stored(fleet, store)
    settings = {"hicache_storage_prefetch_policy": "best_effort"}
    fleet.each("open", store, by_rank={1: {"trouble": {"latency_s": 0.3}}}, **settings)
    assert fleet.same("request", PROMPT) == COMPUTED
    fleet.all("close")


def test_a_failing_store_of_one_rank_is_a_miss_for_all(fleet: Fleet, store: str) -> None:
    stored(fleet, store)
    fleet.each("open", store, by_rank={0: {"trouble": {"failing": True}}})
    assert fleet.same("request", PROMPT) == COMPUTED
    counters = fleet.all("counters")
    assert [counter["storage_loaded_tokens"] for counter in counters] == [0] * len(counters)
    assert fleet.same("flush")
    fleet.all("close")


def test_writes_that_one_rank_loses_are_tried_again_by_all(fleet: Fleet, store: str) -> None:
    """A page is stored only if every rank's part is; the next use tries again."""
    fleet.each("open", store, by_rank={1: {"trouble": {"failing": True}}})
    fleet.same("request", PROMPT)
    assert fleet.same("flush")
    assert {counter["stored_pages"] for counter in fleet.all("counters")} == {0}
    fleet.all("trouble")
    fleet.same("request", PROMPT, prefetch=False)
    assert fleet.same("forget")
    assert fleet.same("request", PROMPT) == LOADED
    fleet.all("close")


@pytest.mark.parametrize("n_kept", [0, 3])
def test_pages_that_one_rank_misses_are_missed_by_all(
    fleet: Fleet, store: str, n_kept: int
) -> None:
    stored(fleet, store)
    last = fleet.ranks[-1]
    fleet.each("open", store, by_rank={last: {"trouble": {"n_kept": n_kept}}})
    outcome = {"host": 4 * n_kept, "storage": 4 * n_kept, "computed_pages": 8 - n_kept}
    assert fleet.same("request", PROMPT) == {"device": 0} | outcome
    fleet.all("close")


def test_the_host_pools_are_as_large_as_the_smallest(fleet: Fleet, store: str) -> None:
    """So that no rank evicts what another keeps."""
    sizes = fleet.each("open", store, by_rank={1: {"hicache_ratio": 0.25}}, hicache_ratio=2.0)
    assert sizes == [8] * len(fleet.ranks)
    for start in range(0, 240, 40):
        fleet.same("request", list(range(start, start + 33)))
        assert fleet.same("flush")
    assert {counter["evicted_host_pages"] for counter in fleet.all("counters")} == {5 * 8}
    assert fleet.same("forget")
    assert fleet.same("request", list(range(80, 113))) == LOADED
    fleet.all("close")


def test_pools_too_small_for_the_load_never_stop_a_rank(fleet: Fleet, store: str) -> None:
    """Host of two pages, device of twelve, one rank slow: all finish, alike."""
    by_rank = {0: {"trouble": {"latency_s": 0.02}}, 1: {"hicache_ratio": 0.2}}
    fleet.each("open", store, by_rank=by_rank, device_pages=12, hicache_ratio=2.0)
    for start in [0, 40, 80, 0, 120, 40, 0]:
        fleet.same("request", list(range(start, start + 36)))
    assert fleet.same("forget")
    fleet.all("close")


def test_settings_that_differ_are_named_on_every_rank(fleet: Fleet, store: str) -> None:
    with pytest.raises(RankFailed, match="prefetch_threshold is") as failed:
        fleet.each("open", store, by_rank={1: {"extra": {"prefetch_threshold": 8}}})
    assert str(failed.value).count("ConfigError: ") == len(fleet.ranks)


def test_a_store_that_one_rank_cannot_open_is_an_error_on_every_rank(
    fleet: Fleet, store: str
) -> None:
    """And the ranks are still together: the next cache opens."""
    with pytest.raises(RankFailed) as failed:
        fleet.each("open", by_rank={0: {"path": f"{store}/no/parent"}}, path=store)
    text = str(failed.value)
    assert "another rank could not open its cache" in text
    assert text.count("RankLost: ") == len(fleet.ranks) - 1
    fleet.same("open", store)
    assert fleet.same("request", PROMPT) == COMPUTED
    fleet.all("close")
