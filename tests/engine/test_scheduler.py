"""Requests through the scheduler give the tokens that the model gives alone, from every tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache_core.types import CachedTokens, Namespace
from tests.engine.world import (
    PAGE_SIZE,
    cache_config,
    greedy,
    model_of,
    plain,
    prompt_of,
    stepped_engine,
)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_one_request_has_the_tokens_of_plain_generate(architecture: str) -> None:
    loaded = model_of(architecture)
    prompt = prompt_of(21)
    with stepped_engine(loaded) as it:
        asked = it.ask(prompt, greedy(10))
        it.run()
        assert it.tokens(asked) == plain(loaded, prompt, 10)
        last = it.last(asked)
        assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == (
            "length",
            21,
            10,
        )


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 7, 64])
def test_prompts_are_computed_in_chunks_of_any_size(chunk_tokens: int) -> None:
    prompts = [prompt_of(n, seed=n) for n in (1, 5, 16, 30)]
    with stepped_engine(chunk_tokens=chunk_tokens) as it:
        asked = [it.ask(prompt) for prompt in prompts]
        it.run()
        for request_id, prompt in zip(asked, prompts, strict=True):
            assert it.tokens(request_id) == plain(it.loaded, prompt, 8)


def test_many_requests_with_shared_prefixes_at_once() -> None:
    system = prompt_of(18, seed=99)
    prompts = [system[: 9 + 3 * (n % 4)] + prompt_of(3 + n, seed=n) for n in range(12)]
    with stepped_engine(n_pages=200, max_running=5, chunk_tokens=16) as it:
        asked = [it.ask(prompt) for prompt in prompts]
        it.run()
        for request_id, prompt in zip(asked, prompts, strict=True):
            assert it.tokens(request_id) == plain(it.loaded, prompt, 8)


def test_cached_says_to_the_page_what_the_device_had() -> None:
    prompt = prompt_of(21)
    with stepped_engine() as it:
        first = it.ask(prompt)
        it.run()
        assert it.last(first).cached == CachedTokens()
        second = it.ask(prompt)
        it.run()
        assert it.last(second).cached == CachedTokens(device=20)
        assert it.tokens(second) == it.tokens(first)
        longer = prompt + list(it.tokens(first))
        third = it.ask(longer)  # 29 tokens; the last of the answer was never computed: 28 were
        it.run()
        assert it.last(third).cached == CachedTokens(device=28)
        assert it.tokens(third) == plain(it.loaded, longer, 8)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    prompt = prompt_of(4 * PAGE_SIZE)
    with stepped_engine() as it:
        for expected in (0, 3 * PAGE_SIZE):
            asked = it.ask(prompt)
            it.run()
            assert it.last(asked).cached == CachedTokens(device=expected)
            assert it.tokens(asked) == plain(it.loaded, prompt, 8)


def test_a_prefix_comes_from_the_host_when_the_device_gave_it_up() -> None:
    prompt = prompt_of(21)
    with stepped_engine() as it:
        it.ask(prompt, greedy(1))
        it.run()
        it.cache.flush()
        it.cache.evict(it.pool.n_pages)
        again = it.ask(prompt)
        it.run()
        assert it.last(again).cached == CachedTokens(host=20)
        assert it.tokens(again) == plain(it.loaded, prompt, 8)


def test_a_prefix_comes_from_storage_after_a_restart(tmp_path: Path) -> None:
    prompt = prompt_of(21)
    config = cache_config(hicache_storage_backend="file", extra={"path": str(tmp_path)})
    with stepped_engine(cache=config) as it:
        it.ask(prompt, greedy(1))
        it.run()
        assert it.cache.flush()
    with stepped_engine(cache=config) as it:
        again = it.ask(prompt)
        it.run()
        assert it.last(again).cached == CachedTokens(storage=20)
        assert it.tokens(again) == plain(it.loaded, prompt, 8)
        explanation = it.cache.explain(again)
        assert explanation is not None


def test_namespaces_share_nothing() -> None:
    prompt = prompt_of(21)
    with stepped_engine() as it:
        it.ask(prompt, namespace=Namespace(cache_salt="a"))
        it.run()
        other = it.ask(prompt, namespace=Namespace(cache_salt="b"))
        it.run()
        assert it.last(other).cached == CachedTokens()


def test_generated_pages_are_stored_while_decoding() -> None:
    prompt = prompt_of(9)
    with stepped_engine(offload_stride=2) as it:
        asked = it.ask(prompt, greedy(32))
        it.run_until(lambda: len(it.tokens(asked)) == 20)  # 28 computed: 7 pages, 2 + 2 + 2 stored
        sequence = prompt + list(it.tokens(asked))
        assert it.cache.match_prefix(sequence, touch=False).n_tokens == 6 * PAGE_SIZE
        it.run()
        assert it.tokens(asked) == plain(it.loaded, prompt, 32)


def test_without_a_stride_generated_pages_are_stored_at_the_end() -> None:
    prompt = prompt_of(9)
    with stepped_engine() as it:
        asked = it.ask(prompt, greedy(20))
        it.run_until(lambda: len(it.tokens(asked)) == 19)
        sequence = prompt + list(it.tokens(asked))
        assert it.cache.match_prefix(sequence, touch=False).n_tokens == 2 * PAGE_SIZE
        it.run()
        assert it.cache.match_prefix(sequence, touch=False).n_tokens == 28


def test_a_higher_priority_goes_first() -> None:
    with stepped_engine(max_running=1) as it:
        low = it.ask(prompt_of(5), priority=0)
        high = it.ask(prompt_of(6), priority=1)
        it.run_until(lambda: bool(it.outputs[high]))
        assert not it.outputs[low]
        it.run()
        assert it.last(low).finish_reason == "length"
