"""Models whose KV depends on the length: every answer is that of the model without a cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM

from hicache_core.config.settings import HiCacheConfig
from hicache_core.integrations.length_rule import NO_LIMIT, length_rule_of
from hicache_core.integrations.transformers import Answer, CachedModel
from hicache_core.types import Namespace

from .odd_models import LIMIT, odd_model, plain, prompt_of

PAGE_SIZE = 4
N_NEW = 8
SHARED = Namespace()
PROMPT = prompt_of(2 * LIMIT)
# One that stays below the limit, one that crosses it while it is answered, three at it, and beyond.
LENGTHS = (LIMIT // 2, LIMIT - 4, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 2, 2 * LIMIT)


@contextmanager
def opened(name: str) -> Iterator[CachedModel]:
    """A cache over one of the models; at the end every page is free."""
    config = HiCacheConfig(page_size=PAGE_SIZE)
    with CachedModel.open(odd_model(name), config, device_tokens=2048) as cached:
        yield cached
        assert cached.cache.flush()
        cached.cache.check_integrity()
        cached.cache.evict(cached.device_pool.n_pages)
        assert cached.device_pool.allocator.n_free == cached.device_pool.n_pages


def fresh(name: str, prompt: list[int]) -> list[int]:
    """The answer of a model that has seen nothing else: with dynamic rope it would remember."""
    return _fresh(name, tuple(prompt))


@functools.cache
def _fresh(name: str, prompt: tuple[int, ...]) -> list[int]:
    return plain(odd_model(name), list(prompt), N_NEW)


def ask(cached: CachedModel, prompt: list[int], namespace: Namespace = SHARED) -> Answer:
    return cached.generate(prompt, namespace=namespace, max_new_tokens=N_NEW, do_sample=False)


@pytest.mark.parametrize("name", ["longrope", "phi3", "dynamic", "doge"])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1]], ids=["growing", "shrinking"])
def test_prompts_on_both_sides_of_the_limit_are_answered_as_without_a_cache(
    name: str, lengths: tuple[int, ...]
) -> None:
    with opened(name) as cached:
        for n_tokens in (*lengths, *lengths):
            prompt = PROMPT[:n_tokens]
            assert ask(cached, prompt).tokens == fresh(name, prompt), n_tokens


@pytest.mark.parametrize(("name", "shared"), [("longrope", 120), ("phi3", 120), ("dynamic", 0)])
def test_prompts_share_among_themselves_below_the_limit_and_beyond_it(
    name: str, shared: int
) -> None:
    """What differs is never mixed: neither is a prefix of the other's."""
    below, beyond, other = PROMPT[:40], PROMPT[:120], [*PROMPT[:100], *prompt_of(20, seed=3)]
    with opened(name) as cached:
        assert ask(cached, below).cached.total == 0
        assert ask(cached, beyond).cached.total == 0
        assert ask(cached, below).cached.total == 36
        assert ask(cached, [*PROMPT[:30], 20, 21]).cached.total == 28
        assert ask(cached, beyond).cached.total == (shared and 116)
        assert ask(cached, other).cached.total == (shared and 100)
        assert ask(cached, other, Namespace(extra_key="x")).cached.total == 0


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_an_answer_that_crosses_the_limit_keeps_what_is_below_it(name: str) -> None:
    prompt = PROMPT[: LIMIT - 4]
    with opened(name) as cached:
        answer = ask(cached, prompt)
        longer = [*prompt, *answer.tokens]
        assert len(longer) > LIMIT
        assert ask(cached, longer[: LIMIT - 1]).cached.total == LIMIT - 4
        assert ask(cached, longer).tokens == fresh(name, longer)


@pytest.mark.parametrize("name", ["longrope", "phi3", "dynamic"])
@pytest.mark.parametrize("n_tokens", [LIMIT - 4, LIMIT + 20])
def test_a_loop_of_ones_own_may_cross_the_limit_too(name: str, n_tokens: int) -> None:
    """Forwards of several tokens end beyond it; what they leave serves nobody wrongly."""
    prompt, more = PROMPT[:n_tokens], prompt_of(10, seed=5)
    with opened(name) as cached, torch.no_grad():
        with cached.turn(prompt) as turn:
            for new in (prompt, more):
                start = turn.past.get_seq_length()
                positions = torch.arange(start, start + len(new))[None]
                cached.model(torch.tensor([new]), position_ids=positions, past_key_values=turn.past)
            turn.store([*prompt, *more])
        for longer in (prompt, [*prompt, *more], PROMPT):
            assert ask(cached, longer).tokens == fresh(name, longer)


def test_a_prompt_by_chunks_leaves_nothing_that_was_rotated_in_two_ways() -> None:
    with opened("longrope") as cached:
        cached.generate(PROMPT[:80], max_new_tokens=1, do_sample=False, prefill_chunk_size=20)
        assert ask(cached, PROMPT[:80]).tokens == fresh("longrope", PROMPT[:80])


@pytest.mark.parametrize("name", ["llama", "linear", "yarn", "llama3", "llava"])
def test_other_rotary_embeddings_have_no_limit(name: str) -> None:
    assert length_rule_of(odd_model(name)) == NO_LIMIT


def test_a_dynamic_type_whose_frequencies_are_fixed_has_no_limit() -> None:
    """HunYuan calls a constant base "dynamic"."""
    config = HunYuanDenseV1Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=1,
        pad_token_id=0,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1e3, "factor": 1.0},
    )
    assert length_rule_of(HunYuanDenseV1ForCausalLM(config)) == NO_LIMIT


def test_limits_that_differ_by_type_of_layer_are_kept_at_the_least() -> None:
    model = odd_model("longrope")
    rope = model.config.rope_parameters
    own = {**rope, "original_max_position_embeddings": 32}
    model.config.rope_parameters = {"full_attention": rope, "sliding_attention": own}
    rule = length_rule_of(model)
    assert (rule.context, rule.has_long_kind) == (32, False)
