"""Models with windows, states, indexers, shared KV or several shapes: the same from every tier."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import ConfigError, SpecError, UseAfterClose
from hicache_core.integrations.model_check import forward, windows_of
from hicache_core.integrations.model_spec import full_kv_spec_of, kv_spec_of
from hicache_core.integrations.paged_cache import PagedCache
from hicache_core.integrations.transformers import CachedModel, CachedTokens
from hicache_core.kv.spec import GroupKind
from hicache_core.pools.device import DevicePool
from hicache_core.radix.results import Units

from .mixed_models import MIXED, REFUSED, STATEFUL, mixed_model
from .odd_models import prompt_of
from .test_transformers_model import (
    NEW_TOKENS,
    FailingQueue,
    KernelTransfer,
    ThreadQueue,
    World,
    answer_of,
    ask,
    assert_nothing_leaks,
    empty_device,
    plain,
    whole_pages,
)

PAGE_SIZE = 4
PROMPT = prompt_of(34)
KNOWN = whole_pages(len(PROMPT) - 1)
SOME = ["falcon_h1", "lfm3", "mamba2", "qwen3_next"]
"""Attention and state in one layer; a window as well; no attention; a delta rule."""

DECODES_OTHERWISE = {"nemotron_h", "zamba2"}
"""transformers computes other states token by token, so their answers are not stored."""


@functools.cache
def model_of(name: str) -> Any:
    return mixed_model(name)


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


def logits_of(cached: CachedModel, prompt: list[int]) -> torch.Tensor:
    """Logits of the last token of a prompt over what is cached; nothing is stored."""
    with cached.turn(prompt) as turn, torch.no_grad():
        return forward(cached.model, prompt[turn.past.get_seq_length() :], turn.past)[-1]


def assert_finds(cached: CachedModel, found: CachedTokens, n_tokens: int) -> None:
    """All on the device; but of windows it keeps those at the end of a prompt and of an answer."""
    if any(windows_of(cached.model.config)):
        assert (found.total, found.storage) == (n_tokens, 0)
    else:
        assert found == CachedTokens(device=n_tokens)


def whole_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, prompt, DynamicCache(config=model.config))[-1]


SLOW = pytest.mark.full  # in transformers' own code for a CPU
BY_NAME = [pytest.param(name, marks=SLOW if name == "kimi_linear" else ()) for name in MIXED]


@pytest.mark.parametrize("name", BY_NAME)
def test_each_tier_serves_the_same_tokens_and_logits(name: str, world: World) -> None:
    model = model_of(name)
    want = whole_logits(model, PROMPT)

    def check(cached: CachedModel, expected: CachedTokens) -> None:
        assert ask(cached, PROMPT) == expected
        torch.testing.assert_close(logits_of(cached, PROMPT), want, atol=2e-3, rtol=1e-3)

    first = world.open(model)
    check(first, CachedTokens())
    assert_finds(first, ask(first, PROMPT), KNOWN)
    empty_device(first)
    check(first, CachedTokens(host=KNOWN))
    check(world.open(model), CachedTokens(storage=KNOWN))


@pytest.mark.parametrize("name", SOME)
def test_a_conversation_finds_all_that_was_computed_before(name: str, world: World) -> None:
    """The snapshot at the last page boundary of an answer is what the next prompt goes on from."""
    cached, prompt, known = world.open(model_of(name)), PROMPT[:21], 0
    for turn in range(3):
        assert ask(cached, prompt) == CachedTokens(device=known)
        known = whole_pages(len(prompt) + NEW_TOKENS - 1)
        prompt = [*prompt, *plain(cached.model, prompt), *prompt_of(9, seed=turn + 1)]


@pytest.mark.parametrize("name", sorted(DECODES_OTHERWISE))
def test_an_answer_that_is_computed_otherwise_than_a_prompt_is_not_stored(
    name: str, world: World
) -> None:
    cached = world.open(model_of(name))
    ask(cached, PROMPT)
    longer = [*PROMPT, *plain(cached.model, PROMPT), 7, 8, 9]
    assert ask(cached, longer) == CachedTokens(device=KNOWN)


@pytest.mark.parametrize("name", SOME)
def test_two_prompts_share_a_prefix_up_to_a_snapshot(name: str, world: World) -> None:
    """The second one leaves a snapshot where they part, and a third one goes on from there."""
    cached = world.open(model_of(name), state_snapshot_interval=8)
    ask(cached, PROMPT)
    other = [*PROMPT[:22], *prompt_of(12, seed=1)]
    assert_finds(cached, ask(cached, other), 16)
    third = [*PROMPT[:22], *prompt_of(12, seed=2)]
    assert_finds(cached, ask(cached, third), 20)


@pytest.mark.parametrize("name", SOME)
def test_a_snapshot_is_never_written(name: str, world: World) -> None:
    """However often one goes on from it."""
    cached = world.open(model_of(name))
    ask(cached, PROMPT)
    match = cached.cache.match_prefix(PROMPT[:-1], touch=False)
    at = [group.kind for group in cached.device_pool.spec.groups].index(GroupKind.STATE)
    (unit,) = match.groups[at].device
    pool = cached.device_pool.groups[at]
    before = [layer[unit].clone() for layers in pool.buffers for layer in layers]
    ask(cached, [*PROMPT, 5, 6, 7, 8])
    ask(cached, PROMPT)
    after = [layer[unit] for layers in pool.buffers for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["deepseek_v32", "falcon_h1", "gemma2", "lfm3", "mamba2"])
def test_a_wrong_page_of_any_component_or_group_is_seen(name: str, world: World) -> None:
    """The comparisons above can fail."""
    cached = world.open(model_of(name))
    ask(cached, PROMPT)
    right = logits_of(cached, PROMPT)
    match = cached.cache.match_prefix(PROMPT[:-1], touch=False)
    pools = [(cached.device_pool, match.device_pages[-1])]
    for pool, units in zip(cached.device_pool.groups, match.groups, strict=True):
        pools.append((pool, units.device[-1]))
    n_seen = 0
    for pool, page in pools:
        for component, layers in zip(pool.spec.components, pool.buffers, strict=True):
            saved = layers[0][page].clone()
            layers[0][page].normal_(std=3.0, generator=torch.Generator().manual_seed(1))
            moved = (logits_of(cached, PROMPT) - right).abs().max()
            assert moved > 0.01, component.name
            layers[0][page].copy_(saved)
            n_seen += 1
    assert n_seen >= 2
    assert torch.equal(logits_of(cached, PROMPT), right)


@pytest.mark.parametrize("name", ["gemma2", "lfm3", "mamba2"])
def test_a_load_that_fails_is_computed_instead(name: str, world: World) -> None:
    cached = world.open(model_of(name))
    ask(cached, PROMPT)
    empty_device(cached)
    for group in cached.cache.parts.groups:
        assert group.host is not None
        broken = KernelTransfer(group.device, group.host, FailingQueue(), ThreadQueue())
        broken.open()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group.transfer, "to_device", broken.to_device)
            assert ask(cached, PROMPT) == CachedTokens()
            broken.close()
        empty_device(cached)
    answers = [answer_of(cached, PROMPT) for _ in range(2)]  # the cache may tell of it once more
    assert answers[-1].tokens == plain(cached.model, PROMPT)
    assert ask(cached, PROMPT).total == KNOWN


@pytest.mark.parametrize("name", SOME)
def test_a_loop_of_ones_own_leaves_a_snapshot(name: str, world: World) -> None:
    cached = world.open(model_of(name))
    for known in (0, KNOWN):
        tokens = list(PROMPT)
        with cached.turn(tokens) as turn, torch.no_grad():
            assert_finds(cached, turn.cached, known)
            while len(tokens) < len(PROMPT) + NEW_TOKENS:
                logits = forward(cached.model, tokens[turn.past.get_seq_length() :], turn.past)
                tokens.append(int(logits[-1].argmax()))
            turn.store(tokens)
        assert tokens[len(PROMPT) :] == plain(cached.model, PROMPT)


@pytest.mark.parametrize("name", SOME)
def test_a_turn_that_stores_nothing_leaves_no_page_and_no_unit(name: str, world: World) -> None:
    cached = world.open(model_of(name))
    with cached.turn(PROMPT) as turn:
        forward(cached.model, PROMPT[turn.past.get_seq_length() :], turn.past)
    with pytest.raises(UseAfterClose):
        forward(cached.model, [1], turn.past)
    assert_nothing_leaks(cached)
    assert ask(cached, PROMPT) == CachedTokens()


def test_a_state_cannot_take_back_tokens(world: World) -> None:
    cached = world.open(model_of("qwen3_next"))
    with cached.turn(PROMPT) as turn:
        with pytest.raises(ConfigError, match="of which rejected tokens cannot be taken back"):
            turn.past.activate_past_recording()
        with pytest.raises(ConfigError, match="1 tokens cannot be taken back"):
            turn.past.crop(-1)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        answer_of(cached, PROMPT, prompt_lookup_num_tokens=3)
    with pytest.raises(SpecError, match="one sequence, found a batch of 2"):
        answer_of(cached, PROMPT, num_beams=2)
    with pytest.raises(SpecError, match="one sequence, found a batch of 2"):
        answer_of(world.open(model_of("mamba2")), PROMPT, num_beams=2)


def test_a_window_of_which_only_the_end_was_loaded_cannot_be_cropped_before_it() -> None:
    model = model_of("gemma2")
    pool = DevicePool.with_groups(kv_spec_of(model, "tiny"), PAGE_SIZE, 16, [16])
    pages, units = pool.allocator.allocate(8), pool.groups[0].allocator.allocate(3)
    window = Units(5, units, array("i", [-1] * 3))
    past = PagedCache(pool, pages, units=[window])
    assert past.get_seq_length() == 32
    with pytest.raises(ConfigError, match="cannot be cropped to 28"):
        past.crop(-4)


def test_without_room_for_a_snapshot_the_oldest_of_the_turn_is_given_up(world: World) -> None:
    """A prompt with more snapshots than the pool: the last ones stay."""
    cached = world.open(model_of("mamba2"), device_tokens=64, state_snapshot_interval=4)
    (pool,) = cached.device_pool.groups
    pages = cached.cache.allocate_units(0, pool.n_pages - 2)
    assert ask(cached, PROMPT) == CachedTokens()
    cached.cache.free_units(0, pages)
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)
    assert ask(cached, [*PROMPT[:20], *prompt_of(9, seed=3)]).total == 0


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"deepseek_v4", "minimax"}))
def test_a_model_whose_state_does_not_reach_what_follows_is_refused(name: str) -> None:
    reason = "keep no KV" if name == "recurrent_gemma" else "ignores its recurrent state when"
    with pytest.raises(SpecError, match=reason):
        CachedModel.open(model_of(name), HiCacheConfig())


def test_layers_and_caches_of_a_models_own_are_refused_by_name() -> None:
    with pytest.raises(SpecError, match="layers of the kind DeepseekV4CSACache, DeepseekV4HCA"):
        CachedModel.open(model_of("deepseek_v4"), HiCacheConfig())
    with pytest.raises(SpecError, match="MiniMax uses cache of its own"):
        CachedModel.open(model_of("minimax"), HiCacheConfig())


def test_the_spec_says_which_layers_have_what() -> None:
    spec = kv_spec_of(model_of("lfm3"), "x")
    assert [(part.name, part.layers) for part in spec.components] == [("k", (3,)), ("v", (3,))]
    window, state = spec.groups
    assert (window.name, window.window) == ("swa", 10)
    assert [part.layers for part in window.spec.components] == [(1,), (1,)]
    assert (state.name, state.kind) == ("mamba", GroupKind.STATE)
    assert [(part.name, part.layers) for part in state.spec.components] == [("conv_0", (0, 2))]


def test_a_spec_without_groups_has_all_pages_of_windows() -> None:
    spec = full_kv_spec_of(model_of("gemma2"), "x")
    assert not spec.groups
    assert [(part.name, part.layers) for part in spec.components] == [("k", None), ("v", None)]
    with pytest.raises(SpecError, match="keep a state"):
        full_kv_spec_of(model_of("lfm3"), "x")
    with pytest.raises(SpecError, match="several shapes"):
        full_kv_spec_of(model_of("gemma4"), "x")


@pytest.mark.parametrize("name", sorted(set(STATEFUL) - {"kimi_linear"}))
def test_a_forward_counts_its_tokens(name: str) -> None:
    """Also of a model without attention, whose layers have no length."""
    model = model_of(name)
    spec = kv_spec_of(model, "x")
    past = PagedCache(
        DevicePool.with_groups(spec, PAGE_SIZE, 8, [8] * len(spec.groups)), array("i")
    )
    with torch.no_grad():
        for n_tokens, total in ((5, 5), (1, 6), (3, 9), (1, 10)):
            forward(model, PROMPT[:n_tokens], past)
            assert past.get_seq_length() == total
