"""Layers with windows: prompts longer than the window are answered as without a cache."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MoshiConfig, MoshiForCausalLM

from hicache_core.errors import SpecError
from hicache_core.integrations.model_check import check_model, forward
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.integrations.paged_cache import PagedCache
from hicache_core.integrations.transformers import CachedTokens
from hicache_core.pools.device import DevicePool

from .mixed_models import WINDOW, WINDOWED, mixed_model
from .odd_models import prompt_of
from .test_transformers_model import World, ask, plain, whole_pages

PAGE_SIZE = 4
PROMPT = prompt_of(3 * WINDOW + 3)
KNOWN = whole_pages(len(PROMPT) - 1)


@pytest.fixture(params=WINDOWED)
def model(request: pytest.FixtureRequest) -> Any:
    return mixed_model(request.param)


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


def both_caches(model: Any) -> tuple[PagedCache, DynamicCache]:
    pool = DevicePool.with_groups(kv_spec_of(model, "tiny"), PAGE_SIZE, 32, [32])
    return PagedCache(pool, array("i")), DynamicCache(config=model.config)


def test_a_conversation_goes_on_beyond_the_window(model: Any, world: World) -> None:
    cached, prompt, known = world.open(model), PROMPT[:7], 0
    for turn in range(4):
        assert ask(cached, prompt) == CachedTokens(device=known)
        known = whole_pages(len(prompt) + 6 - 1)
        prompt = [*prompt, *plain(model, prompt), *prompt_of(9, seed=turn + 1)]


def test_two_prompts_may_part_inside_the_window(model: Any, world: World) -> None:
    cached = world.open(model)
    ask(cached, PROMPT)
    for n_shared in (WINDOW - 2, KNOWN - WINDOW + 2, KNOWN - 2):
        other = [*PROMPT[:n_shared], *prompt_of(len(PROMPT) - n_shared, seed=n_shared)]
        assert ask(cached, other).total == whole_pages(n_shared)


def test_a_page_counts_for_the_tier_that_its_window_came_from(model: Any, world: World) -> None:
    """A second process has read the window at the end of a prompt. Another prompt parts before."""
    first = world.open(model)
    ask(first, PROMPT)
    assert first.cache.flush()
    cached = world.open(model)
    assert ask(cached, PROMPT) == CachedTokens(storage=KNOWN)
    (group,) = cached.device_pool.spec.groups
    n_shared = whole_pages(KNOWN - WINDOW)
    n_before = group.first_needed(n_shared // PAGE_SIZE, PAGE_SIZE) * PAGE_SIZE
    other = [*PROMPT[:n_shared], *prompt_of(len(PROMPT) - n_shared, seed=1)]
    assert ask(cached, other) == CachedTokens(device=n_before, storage=n_shared - n_before)


def test_a_layer_hands_out_what_transformers_own_layer_does(model: Any) -> None:
    """In parts that end before, at and behind the edge of the window, token by token as well."""
    paged, plain_cache = both_caches(model)
    at = 0
    with torch.no_grad():
        for n_tokens in (3, WINDOW - 4, 1, 1, 1, WINDOW + 2, 1, 2):
            ids, at = PROMPT[at : at + n_tokens], at + n_tokens
            for n_query in (1, 5):
                sizes = [plain_cache.get_mask_sizes(n_query, layer) for layer in range(4)]
                assert [paged.get_mask_sizes(n_query, layer) for layer in range(4)] == sizes
            found = forward(model, ids, paged)
            assert torch.equal(found, forward(model, ids, plain_cache))
    assert paged.get_seq_length() == plain_cache.get_seq_length() == at
    assert paged.is_sliding == plain_cache.is_sliding
    assert paged.get_max_length() == plain_cache.get_max_length()


def test_crop_beyond_the_window_leaves_no_trace(model: Any) -> None:
    paged, plain_cache = both_caches(model)
    with torch.no_grad():
        forward(model, PROMPT[:-6], plain_cache)
        want = forward(model, PROMPT[-6:], plain_cache)
        forward(model, [*PROMPT[:-6], 5, 6, 7], paged)
        paged.crop(-3)
        found = forward(model, PROMPT[-6:], paged)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_window_with_less_room_than_a_prompt_is_stored_in_parts(model: Any, world: World) -> None:
    """Its device pool has room for two windows; what has left the window goes down meanwhile."""
    cached = world.open(model, device_tokens=128, hicache_write_policy="write_through")
    (pool,) = cached.device_pool.groups
    long = prompt_of(90)
    assert pool.n_pages * PAGE_SIZE < len(long)
    assert ask(cached, long) == CachedTokens()
    again = ask(cached, long)  # which needs a page of the window before the one kept on the device
    assert (again.total, again.storage) == (whole_pages(len(long) - 1), 0)
    assert ask(world.open(model), long[:50]).total == 48


def test_a_wrong_row_in_the_window_is_seen(model: Any) -> None:
    """The comparisons above can fail."""
    paged, plain_cache = both_caches(model)
    with torch.no_grad():
        forward(model, PROMPT[:-6], paged)
        forward(model, [*PROMPT[:-8], *prompt_of(2, seed=5)], plain_cache)
        found, other = (forward(model, PROMPT[-6:], past) for past in (paged, plain_cache))
    assert (found - other).abs().max() > 0.01


def test_a_window_in_the_cache_alone_is_refused() -> None:
    """Moshi's cache forgets what its attention would still read."""
    config = MoshiConfig(
        vocab_size=320,
        audio_vocab_size=64,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        sliding_window=100,
        max_position_embeddings=512,
    )
    torch.manual_seed(1)
    model = MoshiForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    with pytest.raises(SpecError, match="over a cached prefix differ"):
        check_model(model)
    assert config.sliding_window == 100
