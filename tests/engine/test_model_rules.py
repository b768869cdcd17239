"""What a model and its configuration ask for is honoured by the engine, or refused at open."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.engine import Engine, EngineConfig
from hicache_core.engine.logits_rules import LogitsRules
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Output, Request, SamplingParams
from hicache_core.engine.scheduler import Scheduler
from hicache_core.errors import ConfigError, HiCacheError, InvalidTokens, SpecError
from tests.page_path.mixed_models import mixed_model
from tests.page_path.odd_models import LIMIT, VOCABULARY, odd_model, plain, prompt_of

N_NEW = 8

ONE_AT_A_TIME = {
    "bart": "beside prompts of other lengths differ",
    "gpt_neo": "local attention counts back from the end of the longest",
    "pegasus": "beside prompts of other lengths differ",
}
"""Models that CachedModel takes, and what is said of them."""


@contextmanager
def opened(model: Any, **config: Any) -> Iterator[Engine]:
    engine = Engine(
        LoadedModel("odd", model, None),
        HiCacheConfig(page_size=4),
        EngineConfig(device_tokens=512, **config),
    )
    engine.open()
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, *prompts: list[int], n_new: int = N_NEW) -> list[list[int]]:
    """Answers to prompts that run at once, greedily."""
    answers: list[list[int]] = [[] for _ in prompts]
    ends = [threading.Event() for _ in prompts]
    for n, prompt in enumerate(prompts):

        def show(output: Output, n: int = n) -> None:
            answers[n].extend(output.new_tokens)
            if output.finish_reason:
                ends[n].set()

        sampling = SamplingParams(max_new_tokens=n_new, temperature=0.0, ignore_eos=True)
        engine.submit(Request(f"r{n}", tuple(prompt), sampling), show)
    assert all(end.wait(60) for end in ends)
    return answers


@pytest.mark.parametrize("name", sorted(ONE_AT_A_TIME))
def test_a_model_that_is_wrong_in_company_is_refused_at_open(name: str) -> None:
    with (
        pytest.raises(SpecError, match=rf"cannot be batched: .*{ONE_AT_A_TIME[name]}") as caught,
        opened(odd_model(name)),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["bloom", "deepseek", "falcon alibi", "llava", "mixtral", "qwen2_moe", "roberta decoder"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_models_answer_prompts_of_several_lengths_at_once(
    name: str, dtype: torch.dtype
) -> None:
    model = odd_model(name, dtype)
    prompts = [prompt_of(50), prompt_of(21, seed=1)]
    with opened(model, chunk_tokens=16) as engine:
        answers = ask(engine, *prompts)
    if dtype == torch.float32:
        assert answers == [plain(model, prompt, N_NEW) for prompt in prompts]


@pytest.mark.parametrize("name", ["deepseek_v32", "gemma2", "lfm3", "mamba2"])
def test_windows_states_and_indexers_are_checked_and_answered_at_once(name: str) -> None:
    model = mixed_model(name)
    prompts = [prompt_of(50), prompt_of(21, seed=1)]
    with opened(model, chunk_tokens=16) as engine:
        assert ask(engine, *prompts) == [plain(model, prompt, N_NEW) for prompt in prompts]


def with_another_scheduler(name: str) -> Engine:
    return Engine(
        LoadedModel(name, mixed_model(name), None),
        HiCacheConfig(page_size=4),
        EngineConfig(device_tokens=512),
        make_scheduler=functools.partial(Scheduler),
    )


def test_where_full_pages_are_moved_windows_are_in_them_and_states_are_refused() -> None:
    engine = with_another_scheduler("gemma2")
    engine.open()
    engine.close()
    assert engine.pool.spec.groups == ()
    with pytest.raises(SpecError, match="layers that keep a state"):
        with_another_scheduler("lfm3").open()


def test_a_listener_that_would_lack_the_windows_is_refused() -> None:
    with (
        opened(mixed_model("gemma2")) as engine,
        pytest.raises(ConfigError, match="keeps swa beside them"),
    ):
        engine.listen(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["longrope", "phi3", "dynamic", "doge"])
def test_the_context_ends_where_kv_becomes_other_kv(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """So neither a neighbour nor a chunk can change an answer, and all prefixes are of one kind."""
    model = odd_model(name)
    prompts = [prompt_of(LIMIT - N_NEW), prompt_of(21, seed=1)]
    with caplog.at_level(logging.WARNING, "hicache_core"), opened(model, chunk_tokens=16) as engine:
        assert engine.status().context_length == LIMIT
        assert ask(engine, *prompts) == [plain(model, prompt, N_NEW) for prompt in prompts]
        with pytest.raises(InvalidTokens, match=f"the context has room for {LIMIT}"):
            ask(engine, prompt_of(LIMIT))
    said = f"the context is {LIMIT} tokens and not the model's 512"
    assert (said in caplog.text) == (name != "dynamic"), "of dynamic ones it is the model's own"


def test_a_longer_context_is_refused() -> None:
    wanted = rf"context_length is {LIMIT + 1}; it must be at most {LIMIT}.*\(longrope\)"
    with pytest.raises(ConfigError, match=wanted), opened(odd_model("phi3"), context_length=65):
        pass
    with opened(odd_model("phi3"), context_length=LIMIT) as engine:
        assert engine.status().context_length == LIMIT


RULES: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[n] for n in range(0, 300, 2)]},
    "bias": {"sequence_bias": [[[n], -50.0] for n in range(100)]},
    "suppressed": {"suppress_tokens": list(range(250))},
    "at the beginning": {"begin_suppress_tokens": list(range(250))},
    "all": {
        "repetition_penalty": 1.3,
        "suppress_tokens": list(range(200)),
        "begin_suppress_tokens": list(range(310)),
    },
}


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
def test_the_rules_of_a_generation_config_are_those_of_generate(settings: dict[str, Any]) -> None:
    model = odd_model("llama")
    prompts = [prompt_of(50), prompt_of(21, seed=1)]
    without = [plain(model, prompt, N_NEW) for prompt in prompts]
    model.generation_config.update(**settings)
    wanted = [plain(model, prompt, N_NEW) for prompt in prompts]
    assert wanted != without
    with opened(model) as engine:
        assert ask(engine, *prompts) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder_repetition_penalty": 1.2},
        {"forced_bos_token_id": 5},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 5},
        {"num_beams": 4},
        {"repetition_penalty": -1.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_rules_that_are_not_followed_are_refused_at_open(settings: dict[str, Any]) -> None:
    model = odd_model("llama")
    model.generation_config.update(**settings)
    with pytest.raises(ConfigError, match=r"generation config") as caught, opened(model):
        pass
    assert "\n" not in str(caught.value)


def test_a_generation_config_without_rules_leaves_logits_alone() -> None:
    logits = torch.zeros(VOCABULARY)
    rules = LogitsRules.of(odd_model("llama"))
    assert rules.applied(logits, Request("r", (1,), SamplingParams()).tokens, 0) is logits


def test_a_refused_model_leaves_the_engine_closed() -> None:
    engine = Engine(LoadedModel("odd", odd_model("bart"), None), HiCacheConfig(), EngineConfig())
    with pytest.raises(HiCacheError):
        engine.open()
    engine.close()
