"""Groups of layers on the way of a page: windows and states, in every tier."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hicache_core.errors import LoadFailed
from tests.page_path.grouped_world import MIXES, PAGE_SIZE, make_grouped_world

mixes = pytest.mark.parametrize("mix", MIXES)


@mixes
def test_a_prompt_is_found_again_on_the_device(mix: str) -> None:
    world = make_grouped_world(mix)
    assert world.request(range(40)).n_tokens == 0
    outcome = world.request(range(48))
    assert (outcome.n_tokens, outcome.n_loaded) == (40, 0)
    world.close()


@mixes
def test_a_prompt_is_found_again_on_the_host(mix: str) -> None:
    world = make_grouped_world(mix)
    world.request(range(40))
    world.cache.flush()
    world.flush_device()
    outcome = world.request(range(48))
    assert outcome.n_tokens == 40
    assert outcome.n_loaded > 0
    world.close()


def test_a_match_ends_where_a_snapshot_is() -> None:
    """A prompt that parts from another one goes on from the last snapshot before."""
    world = make_grouped_world("full and state")
    world.request(range(40))
    outcome = world.request([*range(32), *range(100, 108)])
    assert outcome.n_tokens == 6 * PAGE_SIZE
    assert outcome.cut_by == "mamba"
    world.close()


@mixes
def test_a_prompt_is_found_again_in_storage(mix: str, tmp_path: Path) -> None:
    settings = {"path": str(tmp_path)}
    world = make_grouped_world(mix, backend="file", storage=settings)
    world.request(range(40))
    world.close()
    other = make_grouped_world(mix, backend="file", storage=settings)
    outcome = other.request(range(48))
    assert (outcome.n_tokens, outcome.storage) == (40, 40)
    other.close()


POLICIES = ("write_through", "write_through_selective", "write_back")


@mixes
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("retention", ["keep", "free_once_stored"])
@pytest.mark.parametrize("seed", range(3))
def test_any_requests_over_small_pools(mix: str, policy: str, retention: str, seed: int) -> None:
    """Whatever is asked for, in any order: right bytes, and every unit has one owner."""
    rng = random.Random(seed)
    world = make_grouped_world(
        mix,
        device_pages=14,
        n_units=12,
        storage={"share": uuid.uuid4().hex},
        hicache_ratio=1.5,
        hicache_write_policy=policy,
        hicache_host_retention=retention,
        batch_pages=2,
    )
    for _ in range(60):
        stem = [rng.randrange(2)] * rng.randrange(4, 24) + [7] * rng.randrange(12)
        world.request([*stem, *(rng.randrange(2) for _ in range(rng.randrange(8)))])
        if rng.random() < 0.2:
            world.flush_device()
        if rng.random() < 0.2:
            world.cache.flush()
    world.close()


def test_the_cost_of_snapshots_is_logged_at_start(caplog: pytest.LogCaptureFixture) -> None:
    """Once for a cache with a state, never for one without."""
    with caplog.at_level("INFO", logger="hicache_core"):
        make_grouped_world("full and window").close()
        assert "snapshot" not in caplog.text
        make_grouped_world("full and state", state_snapshot_interval=8).close()
    nbytes = MIXES["full and state"].groups[0].spec.page_nbytes(1)
    assert f"a snapshot of group mamba has {nbytes} bytes" in caplog.text
    assert f"these are {nbytes / 8:.0f} bytes for each token" in caplog.text


def test_units_that_are_given_back_are_not_used_again_before_their_copy_has_ended() -> None:
    """Whoever gave up a request frees its units at once; the copy into them may still run."""
    world = make_grouped_world("full and window", n_units=6, hicache_ratio=4.0)
    world.request(range(24))
    world.cache.flush()
    world.flush_device()
    match = world.cache.match_prefix(range(24))
    world.cache.lock(match.node)
    loaded = world.cache.load_back(match)
    own = loaded.own[0]
    assert len(own) == 2
    world.cache.free_units(0, own)
    pool = world.cache.parts.groups[0].held.device
    taken = pool.allocate(pool.n_free)
    assert set(own).isdisjoint(taken)
    world.cache.free_units(0, taken)
    world.cache.wait_layer(1)
    world.cache.wait(1.0)
    world.cache.poll()
    assert pool.n_free == pool.n_units
    world.cache.unlock(match.node)
    world.close()


def test_a_copy_of_pages_and_one_of_units_that_fail_are_told_together() -> None:
    """Else the next request heard of the second one, and did not wait for its own."""
    world = make_grouped_world("full and window")
    world.request(range(40))
    world.cache.flush()
    world.flush_device()
    parts = world.cache.parts
    transfers: tuple[Any, ...] = (parts.transfer, parts.groups[0].transfer)
    for transfer in transfers:
        transfer._prepare = _failing
    match = world.cache.match_prefix(range(40))
    world.cache.lock(match.node)
    loaded = world.cache.load_back(match)
    while not world.cache.loads_settled:
        world.cache.wait(1.0)
        world.cache.poll()
    assert world.cache.n_failed_loads == 2
    with pytest.raises(LoadFailed):
        world.cache.wait_layer(0)
    world.cache.wait_layer(0)
    world.cache.free_units(0, loaded.own[0])
    world.cache.unlock(match.node)
    world.close()


def _failing(*_: object) -> Callable[[range], None]:
    def copy(layers: range) -> None:
        raise RuntimeError("no such luck")

    return copy


def test_the_last_window_of_a_prompt_is_copied_down_before_the_others() -> None:
    """If the host has room for a part only, the part that one goes on from is there."""
    world = make_grouped_world("full and window", n_units=16, hicache_ratio=0.25, device_pages=64)
    assert world.cache.parts.groups[0].held.host is not None
    assert world.cache.parts.groups[0].held.host.n_units == 4
    world.request(range(24))
    world.cache.flush()
    world.flush_device()
    assert world.request(range(24)).n_tokens == 24
    world.close()
