"""Arguments of a cached generate: right, or refused before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from hicache_core.errors import ConfigError, InvalidTokens
from hicache_core.integrations.transformers import CachedModel
from hicache_core.types import CachedTokens

from .odd_models import odd_model, prompt_of
from .odd_models import plain as odd_plain
from .test_transformers_model import KNOWN, NEW_TOKENS, PROMPT, World, answer_of, ask, plain
from .tiny_models import tiny_model


@pytest.fixture
def cached() -> Iterator[CachedModel]:
    with ExitStack() as stack:
        yield World(stack).open(tiny_model("llama"))


def plain_with(model: Any, **arguments: Any) -> list[int]:
    """The answer without any cache of ours, given the same arguments."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **arguments}
    ids = torch.tensor([PROMPT])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    tokens: list[int] = output[0, len(PROMPT) :].tolist()
    return tokens


def embeddings(seed: int) -> torch.Tensor:
    return torch.randn(1, len(PROMPT), 64, generator=torch.Generator().manual_seed(seed)) * 0.5


REFUSED: dict[str, Any] = {
    "attention_mask": torch.tensor([[0, 0, *[1] * (len(PROMPT) - 2)]]),
    "cache_implementation": "static",
    "custom_generate": lambda *_, **__: None,
    "decoder_input_ids": torch.tensor([[1]]),
    "encoder_hidden_states": torch.zeros(1, 3, 64),
    "image_grid_thw": torch.tensor([[1, 2, 2]]),
    "inputs_embeds": torch.zeros(1, 3, 64),
    "labels": torch.tensor([[1]]),
    "nonsense": 1,
    "past_key_values": object(),
    "penalty_alpha": 0.6,
    "pixel_values": torch.zeros(1, 3, 8, 8),
    "position_ids": torch.arange(len(PROMPT))[None] + 7,
    "token_healing": True,
    "token_type_ids": torch.ones(1, len(PROMPT), dtype=torch.int64),
    "use_cache": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_change_the_kv_unnamed_is_refused_before_any_work(
    name: str, cached: CachedModel
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached.model, "forward", None)
        with pytest.raises(ConfigError, match=name):
            cached.generate(PROMPT, **{name: REFUSED[name]})
    assert ask(cached, PROMPT) == CachedTokens()


def test_a_padded_prompt_is_told_to_leave_the_padding_out(cached: CachedModel) -> None:
    with pytest.raises(ConfigError, match="take the padding out of the prompt"):
        cached.generate(PROMPT, attention_mask=REFUSED["attention_mask"])


ones = torch.ones(1, len(PROMPT), dtype=torch.int64)
HARMLESS: dict[str, dict[str, Any]] = {
    "what a tokenizer gives": {"attention_mask": ones, "token_type_ids": 0 * ones},
    "a mask as a list": {"attention_mask": [1] * len(PROMPT)},
    "the usual positions": {"position_ids": torch.arange(len(PROMPT))[None]},
    "nothing by name": {"past_key_values": None, "pixel_values": None, "streamer": None},
    "processors": {"logits_processor": LogitsProcessorList()},
    "logits_to_keep": {"logits_to_keep": 3},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_says_what_is_so_anyway_is_taken(name: str, cached: CachedModel) -> None:
    for expected in (CachedTokens(), CachedTokens(device=KNOWN)):
        assert ask(cached, PROMPT, **HARMLESS[name]) == expected


def test_the_output_of_a_tokenizer_is_a_prompt(cached: CachedModel) -> None:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    for wrap in (torch.tensor, list):
        encoded = {"input_ids": wrap([PROMPT]), "attention_mask": wrap([[1] * len(PROMPT)])}
        assert cached.generate(**encoded, **settings).tokens == plain(cached.model, PROMPT)
    with pytest.raises(InvalidTokens, match="found a batch of 2"):
        cached.generate([PROMPT, PROMPT])


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[1, 2, 3]])},
        {"prefill_chunk_size": 8},
        {"generation_config": GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_decoding_by_other_rules_is_what_it_is_without_a_cache(
    arguments: dict[str, Any], cached: CachedModel
) -> None:
    want = plain_with(cached.model, **arguments)
    for _ in range(2):
        assert answer_of(cached, PROMPT, **arguments).tokens == want
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)


def test_assisted_decoding_over_a_prefix_computes_all_of_it(cached: CachedModel) -> None:
    ask(cached, PROMPT)
    for arguments in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model("llama", num_hidden_layers=1)},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
    ):
        assert ask(cached, PROMPT, **arguments) == CachedTokens()
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)


def test_embeddings_are_cached_under_their_content(cached: CachedModel) -> None:
    one, two = embeddings(1), embeddings(2)
    assert plain_with(cached.model, inputs_embeds=one) != plain(cached.model, PROMPT)
    for expected in (CachedTokens(), CachedTokens(device=KNOWN)):
        for given in (one, two):
            answer = answer_of(cached, PROMPT, inputs_embeds=given)
            assert answer.tokens == plain_with(cached.model, inputs_embeds=given)
            assert answer.cached == expected
        assert ask(cached, PROMPT) == expected


@pytest.mark.parametrize("where", ["generation_config", "config", "argument"])
def test_a_saved_use_cache_false_is_put_aside(where: str) -> None:
    model = tiny_model("llama")
    saved = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False)
    if where != "argument":
        getattr(model, where).use_cache = False
    arguments = {"generation_config": saved} if where == "argument" else {}
    with ExitStack() as stack:
        cached = World(stack).open(model)
        for expected in (CachedTokens(), CachedTokens(device=KNOWN)):
            assert ask(cached, PROMPT, **arguments) == expected
    settings = saved if where == "argument" else getattr(model, where)
    assert settings.use_cache is False  # as it was


@pytest.mark.parametrize("where", ["generation_config", "argument"])
def test_a_saved_cache_implementation_is_put_aside(where: str) -> None:
    model = tiny_model("llama")
    want = plain(model, PROMPT)
    saved = GenerationConfig(cache_implementation="static")
    arguments = {"generation_config": saved} if where == "argument" else {}
    if where != "argument":
        model.generation_config.cache_implementation = "static"
    with ExitStack() as stack:
        cached = World(stack).open(model)
        for _ in range(2):
            answer = cached.generate(
                PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, **arguments
            )
            assert answer.tokens == want


def test_the_offset_of_the_last_picture_is_not_the_texts(cached: CachedModel) -> None:
    """Qwen-VL and its kin leave ``rope_deltas`` on a module, and add it over a filled cache."""
    cached.model.model.rope_deltas = torch.tensor([[5]])
    offset_aware = CachedModel(cached.model, cached.cache, cached.device_pool)
    with offset_aware.turn(PROMPT):
        assert cached.model.model.rope_deltas is None


def test_text_after_a_picture_is_answered_as_by_a_model_that_has_seen_none() -> None:
    """Qwen2.5-VL itself: text that was cached before the picture, and text behind it."""
    ids = [*range(20, 60), 6, *[5] * 16, 7, *range(20, 50)]
    picture = {
        "pixel_values": torch.randn(64, 1176, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": torch.tensor([[int(token == 5) for token in ids]]),
    }
    text, more = prompt_of(40, seed=8), prompt_of(60, seed=8)
    want = [odd_plain(odd_model("qwen2_5_vl"), prompt, NEW_TOKENS) for prompt in (text, more)]
    model = odd_model("qwen2_5_vl")
    sampling = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    with ExitStack() as stack:
        seen = World(stack).open(model)
        assert seen.generate(text, **sampling).tokens == want[0]
        prompt = torch.tensor([ids])
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling, **picture)
        assert model.model.rope_deltas.any()
        answers = [seen.generate(given, **sampling) for given in (text, more, more)]
    assert [answer.tokens for answer in answers] == [want[0], want[1], want[1]]
    assert answers[0].cached.total > 0


def test_without_a_policy_of_its_own_a_prompt_waits_for_storage() -> None:
    with ExitStack() as stack:
        world = World(stack)
        settings = world.config().model_dump(exclude_unset=True)
        del settings["hicache_storage_prefetch_policy"]
        for expected in (CachedTokens(), CachedTokens(storage=KNOWN)):
            config = type(world.config())(**settings)
            cached = world.adopt(CachedModel.open(tiny_model("llama"), config, device_tokens=256))
            assert ask(cached, PROMPT) == expected
            assert cached.cache.flush()
