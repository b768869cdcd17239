"""Layers with windows, all of whose pages are kept: logits and tokens are those of the model."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from hicache_core.engine.runner import Past, Runner
from hicache_core.integrations.model_spec import full_kv_spec_of
from hicache_core.pools.device import DevicePool
from hicache_core.types import CachedTokens
from tests.engine.windowed_models import WINDOW, WINDOWED, loaded_model
from tests.engine.world import (
    PAGE_SIZE,
    cache_config,
    greedy,
    plain,
    prompt_of,
    stepped_engine,
)

N_NEW = 12
LONG = prompt_of(5 * WINDOW + 3)
CHUNKS = (WINDOW - 1, 1, 2, WINDOW + 3, 2 * WINDOW, 1)
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, len(LONG))


@pytest.fixture(params=sorted(WINDOWED))
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


def whole(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits of all tokens, computed at once without a cache; (n_tokens, vocabulary)."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float()


def test_logits_are_those_of_the_model_in_chunks_and_beside_other_lengths(name: str) -> None:
    model = loaded_model(name).model
    expected = whole(model, LONG)
    pages = array("i", range(-(-len(LONG) // PAGE_SIZE)))
    runner = Runner(model, DevicePool(full_kv_spec_of(model, "x"), PAGE_SIZE, len(pages)))
    n_past = 0
    for n_tokens in CHUNKS:
        (logits,) = runner.prefill(LONG[n_past : n_past + n_tokens], n_past, pages)
        n_past += n_tokens
        torch.testing.assert_close(logits, expected[n_past - 1], atol=1e-4, rtol=0.0)
    runner.prefill(LONG[n_past:], n_past, pages)  # its pages are decoded in
    logits = runner.decode([Past(LONG[n - 1], n - 1, pages) for n in LENGTHS])
    ends = [n - 1 for n in LENGTHS]
    torch.testing.assert_close(logits, expected[ends], atol=1e-4, rtol=0.0)


def test_what_has_left_all_windows_does_not_matter_and_the_rest_does() -> None:
    """So the models of this module would notice a wrong window."""
    model = loaded_model("mistral").model  # three layers with windows, and no other
    n_reached = 3 * (WINDOW - 1) + 1
    expected = whole(model, LONG)[-1]
    for n_back, is_seen in ((n_reached, True), (n_reached + 1, False)):
        ids = list(LONG)
        ids[-n_back] = (ids[-n_back] + 1) % 512
        assert torch.equal(whole(model, ids)[-1], expected) is not is_seen


def test_answers_are_those_of_generate_from_every_tier(name: str, tmp_path: Path) -> None:
    """Prompts longer than the window, in chunks that end inside it, of several lengths at once."""
    loaded = loaded_model(name)
    prompts = [LONG, prompt_of(2 * WINDOW + 1, seed=1), prompt_of(WINDOW - 2, seed=2)]
    expected = [plain(loaded, prompt, N_NEW) for prompt in prompts]
    n_cached = [(len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE for prompt in prompts]
    config = cache_config(hicache_storage_backend="file", extra={"path": str(tmp_path)})

    def answers(it: Any) -> list[CachedTokens]:
        asked = [it.ask(prompt, greedy(N_NEW)) for prompt in prompts]
        it.run()
        assert [it.tokens(request_id) for request_id in asked] == expected
        return [it.last(request_id).cached for request_id in asked]

    with stepped_engine(
        loaded, spec_of=full_kv_spec_of, cache=config, chunk_tokens=5, max_running=3
    ) as it:
        answers(it)
        assert answers(it) == [CachedTokens(device=n) for n in n_cached]
        it.cache.flush()
        it.cache.evict(it.pool.n_pages)
        assert answers(it) == [CachedTokens(host=n) for n in n_cached]
    with stepped_engine(
        loaded, spec_of=full_kv_spec_of, cache=config, chunk_tokens=5, max_running=3
    ) as it:
        assert [cached.total for cached in answers(it)] == n_cached
        assert it.cache.counters.storage_hit_tokens > 0


def test_conversations_that_part_inside_the_window_have_their_own_answers(name: str) -> None:
    loaded = loaded_model(name)
    shared = LONG[: 4 * WINDOW]
    turns = [shared + prompt_of(WINDOW // 2, seed=n) for n in (1, 2)]
    with stepped_engine(
        loaded, spec_of=full_kv_spec_of, chunk_tokens=WINDOW + 1, max_running=2
    ) as it:
        for _ in range(3):
            asked = [it.ask(turn, greedy(N_NEW)) for turn in turns]
            it.run()
            answers = [it.tokens(request_id) for request_id in asked]
            assert answers == [plain(loaded, turn, N_NEW) for turn in turns]
            turns = [
                turn + list(answer) + prompt_of(3, seed=len(turn) + n)
                for n, (turn, answer) in enumerate(zip(turns, answers, strict=True))
            ]
        assert it.last(asked[0]).cached.device > 4 * WINDOW


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_preempted_and_offloaded_while_decoding_answers_stay_the_same(
    name: str, policy: str
) -> None:
    loaded = loaded_model(name)
    prompts = [prompt_of(WINDOW + 2 * n, seed=n) for n in range(3)]
    config = cache_config(hicache_write_policy=policy, hicache_storage_backend="memory")
    with stepped_engine(
        loaded,
        spec_of=full_kv_spec_of,
        n_pages=13,
        cache=config,
        max_running=3,
        chunk_tokens=7,
        offload_stride=1,
    ) as it:
        asked = [it.ask(prompt, greedy(2 * WINDOW)) for prompt in prompts]
        it.run()
        for request_id, prompt in zip(asked, prompts, strict=True):
            assert it.tokens(request_id) == plain(loaded, prompt, 2 * WINDOW)
        assert it.scheduler.tally.preempted > 0
