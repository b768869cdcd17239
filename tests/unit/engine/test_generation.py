"""Greedy decoding with a clock."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache

from hicache_core.engine.generation import generate_greedy

from .tiny_chat_model import tiny_chat_model

PROMPT = [5, 17, 33, 4, 90, 12]


def test_each_token_is_the_most_probable_after_those_before_it() -> None:
    model = tiny_chat_model(128)
    found = generate_greedy(model, PROMPT, 8)
    tokens = list(PROMPT)
    with torch.no_grad():
        for token in found.tokens:
            assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)
    assert len(found.tokens) == 8 or found.tokens[-1] == model.generation_config.eos_token_id


def test_the_first_logits_belong_to_the_first_token() -> None:
    found = generate_greedy(tiny_chat_model(128), PROMPT, 4)
    assert found.first_logits.shape == (128,)
    assert int(found.first_logits.argmax()) == found.tokens[0]


def test_a_prefix_in_a_cache_changes_no_token() -> None:
    model = tiny_chat_model(128)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([PROMPT[:4]]), past_key_values=past)
    assert generate_greedy(model, PROMPT, 6, past=past).tokens == (
        generate_greedy(model, PROMPT, 6).tokens
    )


def test_the_clock_is_read_at_the_start_at_the_first_token_and_at_the_end() -> None:
    ticks = itertools.count(100.0)
    found = generate_greedy(tiny_chat_model(128), PROMPT, 4, clock=lambda: next(ticks))
    assert (found.ttft_s, found.total_s) == (1.0, 2.0)
    assert found.decode_tokens_per_s == pytest.approx(len(found.tokens) - 1)


def test_a_request_that_began_earlier_is_charged_from_then_on() -> None:
    ticks = itertools.count(100.0)
    found = generate_greedy(
        tiny_chat_model(128), PROMPT, 2, started_at=90.0, clock=lambda: next(ticks)
    )
    assert (found.ttft_s, found.total_s) == (10.0, 11.0)
