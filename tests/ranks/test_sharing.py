"""What ranks hold and share: heads, layers, latents; between fleets too. Real processes on gloo."""

from __future__ import annotations

import pytest

from tests.ranks.fleet import Fleet

PROMPT = list(range(1, 34))  # eight pages and a token
N_PAGES = 8
COMPUTED = {"device": 0, "host": 0, "storage": 0, "computed_pages": N_PAGES}
LOADED = {"device": 0, "host": 32, "storage": 32, "computed_pages": 0}


def stored(fleet: Fleet, store: str, **settings: object) -> None:
    """A fleet computes the prompt, stores it and goes."""
    fleet.same("open", store, **settings)
    assert fleet.same("request", PROMPT) == COMPUTED
    assert fleet.same("flush")
    fleet.all("close")


def test_ranks_agree_by_minimum_and_hear_each_other(fleet: Fleet) -> None:
    assert fleet.same("agree", 7) == [7]
    assert fleet.same("agree", -(2**31)) == [-(2**31)]
    texts = fleet.same("gather", "é" * 1000)
    assert texts == ["é" * 1000 * rank for rank in fleet.ranks]


@pytest.mark.parametrize("layout", ["page_first", "layer_first", "page_first_direct"])
@pytest.mark.parametrize("parallel", ["tensor", "latent", "pipeline"])
def test_what_ranks_stored_they_load_again(
    fleet: Fleet, store: str, parallel: str, layout: str
) -> None:
    """Each rank's own bytes, in every tier; checked by content on every rank."""
    fleet.same("open", store, parallel=parallel, hicache_mem_layout=layout)
    assert fleet.same("request", PROMPT) == COMPUTED
    assert fleet.same("request", PROMPT)["device"] == 32
    assert fleet.same("flush")
    assert fleet.same("evict_device") == N_PAGES
    assert fleet.same("request", PROMPT) == LOADED | {"storage": 0}
    assert fleet.same("forget")
    assert fleet.same("request", PROMPT) == LOADED
    fleet.all("close")


def test_a_latent_is_written_by_one_rank_and_read_by_all(fleet: Fleet, store: str) -> None:
    fleet.same("open", store, parallel="latent")
    fleet.same("request", PROMPT)
    assert fleet.same("flush")
    assert fleet.all("n_written") == [N_PAGES] + [0] * (len(fleet.ranks) - 1)
    fleet.all("close")


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_each_rank_writes_what_it_alone_holds(fleet: Fleet, store: str, parallel: str) -> None:
    fleet.same("open", store, parallel=parallel)
    fleet.same("request", PROMPT)
    assert fleet.same("flush")
    assert fleet.same("n_written") == N_PAGES
    fleet.all("close")


def test_a_latent_is_shared_by_fleets_of_any_size(two: Fleet, four: Fleet, store: str) -> None:
    stored(two, store, parallel="latent")
    four.same("open", store, parallel="latent")
    assert four.same("request", PROMPT) == LOADED
    four.all("close")


def test_fleets_of_two_and_of_four_share_by_head_groups(
    two: Fleet, four: Fleet, store: str
) -> None:
    """Two ranks of four heads store groups of two heads; four ranks of two heads read them."""
    stored(two, store, storage_head_group=2)
    four.same("open", store, storage_head_group=2)
    assert four.same("request", PROMPT) == LOADED
    four.all("close")


def test_and_the_other_way_round(two: Fleet, four: Fleet, store: str) -> None:
    stored(four, store)  # two heads each: groups of two without being told
    two.same("open", store, storage_head_group=2)
    assert two.same("request", PROMPT) == LOADED
    two.all("close")


def test_without_head_groups_fleets_never_take_each_others_pages(
    two: Fleet, four: Fleet, store: str
) -> None:
    stored(two, store)
    stored(four, store)  # which asserts that all was computed
    two.same("open", store)
    assert two.same("request", PROMPT) == LOADED
    two.all("close")
