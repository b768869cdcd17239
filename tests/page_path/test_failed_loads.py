"""A copy up that fails on another rank: known to all alike once it has settled, and then alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hicache_core.errors import LoadFailed
from hicache_core.ranks.base import SingleRank
from tests.page_path.world import SPEC, World, ids, make_world


class AnotherRank(SingleRank):
    """Stands for a second rank, of which all is well, or whose jobs give nothing while ``fails``.

    It emulates what that rank reports; this process is alone.
    """

    fails = False

    def agree_min(self, values: Sequence[int]) -> list[int]:
        # docstring inherited
        if not self.fails:
            return list(values)
        flag, *counts = values
        return [flag, *(min(n_pages, 0) for n_pages in counts)]


def settle_loads(world: World) -> None:
    """What an engine does before it inserts."""
    while not world.cache.loads_settled:
        world.cache.wait(0.001)
        world.cache.poll()


def load(world: World, other: AnotherRank, *, fails: bool) -> int:
    """A request whose four pages come up from the host; loads that had failed when it matched."""
    cache = world.cache
    world.request(ids(16))
    cache.flush(10.0)
    assert cache.evict(4) == 4
    other.fails = fails
    n_failed = cache.n_failed_loads
    match = cache.match_prefix(ids(16))
    cache.lock(match.node)
    loaded = cache.load_back(match)
    assert len(loaded.device_pages) == 4
    assert not cache.loads_settled
    for layer in range(SPEC.num_layers):
        cache.wait_layer(layer)  # on this rank all is well
    cache.unlock(match.node)
    return n_failed


def test_a_load_that_fails_on_another_rank_is_known_when_it_has_settled() -> None:
    other = AnotherRank()
    world = make_world(ranks=other)
    n_failed = load(world, other, fails=True)
    assert world.cache.n_failed_loads == n_failed
    settle_loads(world)
    assert world.cache.n_failed_loads == n_failed + 1
    with pytest.raises(LoadFailed, match="4 pages did not arrive on another rank"):
        world.cache.wait_layer(0)
    world.cache.wait_layer(0)  # told once
    match = world.cache.match_prefix(ids(16))
    assert (match.n_device_tokens, match.n_host_tokens) == (0, 16)
    other.fails = False
    world.close()


def test_a_load_that_goes_well_is_not_counted() -> None:
    other = AnotherRank()
    world = make_world(ranks=other)
    n_failed = load(world, other, fails=False)
    settle_loads(world)
    assert world.cache.n_failed_loads == n_failed == 0
    assert world.cache.match_prefix(ids(16)).n_device_tokens == 16
    world.close()


def test_a_load_that_fails_below_another_takes_nothing_with_it() -> None:
    """To find room for the rest of a prefix, its beginning is settled, and is gone: no error, and
    no page is lost."""
    other = AnotherRank()
    world = make_world(device_pages=8, ranks=other)
    cache = world.cache
    world.request(ids(32))
    cache.flush(10.0)
    assert cache.evict(8) == 8
    other.fails = True
    first = cache.match_prefix(ids(16))
    cache.lock(first.node)
    cache.load_back(first)
    held = cache.allocate(4)
    both = cache.match_prefix(ids(32))
    cache.lock(both.node)
    assert (both.n_device_tokens, both.n_host_tokens) == (16, 16)
    loaded = cache.load_back(both)
    assert (len(loaded.device_pages), len(loaded.host_pages)) == (4, 0)
    assert cache.n_failed_loads == 1
    with pytest.raises(LoadFailed):
        cache.wait_layer(0)
    cache.unlock(both.node)
    cache.unlock(first.node)
    cache.free(held)
    assert world.pool.allocator.n_free == 8
    other.fails = False
    assert world.request(ids(32)).host == 32
    world.close()
