"""A turn: its past is good for one generate, and only as long as the turn lasts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import ConfigError, UseAfterClose
from hicache_core.integrations.transformers import CachedModel
from hicache_core.types import CachedTokens

from .test_transformers_model import KNOWN, NEW_TOKENS, PROMPT, World, ask, plain
from .tiny_models import prompt_of, tiny_model


@pytest.fixture
def cached() -> Iterator[CachedModel]:
    with ExitStack() as stack:
        yield World(stack).open(tiny_model("llama"))


def forward(cached: CachedModel, tokens: list[int], past: object) -> None:
    with torch.no_grad():
        cached.model(torch.tensor([tokens]), past_key_values=past)


@pytest.mark.parametrize("was_read", [False, True])
def test_the_past_of_a_turn_that_has_ended_is_refused(was_read: bool, cached: CachedModel) -> None:
    ask(cached, PROMPT)
    with cached.turn(PROMPT) as turn:
        if was_read:
            forward(cached, PROMPT[KNOWN:], turn.past)
    with pytest.raises(UseAfterClose, match="this turn has ended"):
        forward(cached, [1], turn.past)
    with pytest.raises(UseAfterClose, match="this turn has ended"):
        turn.store(PROMPT)


def test_a_turn_that_begins_ends_the_one_before(cached: CachedModel) -> None:
    with cached.turn(PROMPT) as outer:
        ask(cached, prompt_of(9, seed=3))
        with pytest.raises(UseAfterClose, match="another one began"):
            forward(cached, PROMPT, outer.past)
    ask(cached, PROMPT)


def test_a_second_generate_in_one_turn_is_refused(cached: CachedModel) -> None:
    ids = torch.tensor([PROMPT])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False}
    with cached.turn(PROMPT) as turn:
        cached.model.generate(ids, past_key_values=turn.past, **arguments)
        with pytest.raises(ConfigError, match="has generated already, and its cache holds 31"):
            cached.model.generate(ids, past_key_values=turn.past, **arguments)


def test_the_past_of_a_turn_cannot_be_copied(cached: CachedModel) -> None:
    with cached.turn(PROMPT) as turn:
        with pytest.raises(ConfigError, match=r"cannot be copied.* open another turn"):
            copy.deepcopy(turn.past)
        with pytest.raises(ConfigError, match="cannot be copied"):
            copy.deepcopy({"past_key_values": turn.past})


def test_a_generate_of_ones_own_is_right_though_the_config_says_use_cache_false(
    cached: CachedModel,
) -> None:
    want = plain(cached.model, PROMPT)
    cached.model.generation_config.use_cache = cached.model.config.use_cache = False
    ids = torch.tensor([PROMPT])
    for expected in (CachedTokens(), CachedTokens(device=KNOWN)):
        with cached.turn(PROMPT) as turn:
            assert turn.cached == expected
            output = cached.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=turn.past,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            turn.store(output[0])
        assert output[0, len(PROMPT) :].tolist() == want
    assert cached.model.generation_config.use_cache is False


def test_a_model_that_is_closed_in_a_turn_says_so() -> None:
    config = HiCacheConfig(page_size=4)
    with CachedModel.open(tiny_model("llama"), config, device_tokens=64) as cached:
        with cached.turn(PROMPT) as turn:
            cached.close()
            with pytest.raises(UseAfterClose, match="closed"):
                turn.store(PROMPT)
        with pytest.raises(UseAfterClose, match="closed"):
            cached.generate(PROMPT, max_new_tokens=1)
