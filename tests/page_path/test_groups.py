"""Groups of layers on the way of a page: windows and states, in every tier."""

from __future__ import annotations

import pytest

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
