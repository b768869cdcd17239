"""Models with windows, states, indexers and shared layers: answers are those of ``generate``."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from hicache_core.engine.limits import units_needed
from hicache_core.engine.model import LoadedModel
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.types import CachedTokens
from tests.engine.test_pressure import FailingLoads
from tests.engine.world import (
    PAGE_SIZE,
    SteppedEngine,
    cache_config,
    greedy,
    plain,
    prompt_of,
    stepped_engine,
)
from tests.page_path.mixed_models import MIXED, VOCABULARY, WINDOW, mixed_model

N_NEW = 12
INTERVAL = 16
EVERY_DAY = {"deepseek_v32", "gemma3n", "lfm3", "mamba2"}
"""One model for each kind of layer; the others run in the full depth."""


@pytest.fixture(
    params=[
        name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.full) for name in MIXED
    ]
)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_model(request.param)


@functools.cache
def loaded_model(name: str) -> LoadedModel:
    return LoadedModel(name, mixed_model(name), None)


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    return [token % (VOCABULARY - 20) + 12 for token in prompt_of(n_tokens, seed)]


def answers(it: SteppedEngine, prompts: list[list[int]]) -> list[CachedTokens]:
    """Answers prompts at once, each as ``generate`` does; what was cached of each."""
    asked = [it.ask(prompt, greedy(N_NEW)) for prompt in prompts]
    it.run()
    for request_id, prompt in zip(asked, prompts, strict=True):
        assert it.tokens(request_id) == plain(it.loaded, prompt, N_NEW)
    return [it.last(request_id).cached for request_id in asked]


def empty_device(it: SteppedEngine) -> None:
    """Moves everything to the host."""
    assert it.cache.flush(20.0)
    it.cache.evict(it.pool.n_pages)
    for group, pool in enumerate(it.pool.groups):
        it.cache.free_units(group, it.cache.allocate_units(group, pool.n_pages))


def test_answers_are_those_of_generate_from_every_tier(loaded: LoadedModel, tmp_path: Path) -> None:
    """Prompts longer than a window, in chunks that end inside it, of several lengths at once."""
    prompts = [prompt(43), prompt(17, seed=1), prompt(6, seed=2)]
    config = cache_config(
        hicache_storage_backend="file",
        extra={"path": str(tmp_path)},
        state_snapshot_interval=INTERVAL,
    )
    engine = functools.partial(stepped_engine, loaded, cache=config, chunk_tokens=5, max_running=3)
    with engine() as it:
        assert answers(it, prompts) == [CachedTokens()] * 3
        assert answers(it, prompts) == [CachedTokens(device=n) for n in (40, 16, 4)]
        empty_device(it)
        assert answers(it, prompts) == [CachedTokens(host=n) for n in (40, 16, 4)]
        assert it.scheduler.tally.failed == 0
    with engine() as it:
        assert answers(it, prompts) == [CachedTokens(storage=n) for n in (40, 16, 4)]


def test_a_page_counts_for_the_tier_that_its_window_came_from(tmp_path: Path) -> None:
    """A second process has read the window at the end of a prompt. Another prompt parts before."""
    loaded = loaded_model("gemma3n")
    config = cache_config(hicache_storage_backend="file", extra={"path": str(tmp_path)})
    long = prompt(43)
    other = long[:20] + prompt(10, seed=1)
    with stepped_engine(loaded, cache=config) as it:
        answers(it, [long])
    with stepped_engine(loaded, cache=config) as it:
        assert answers(it, [long]) == [CachedTokens(storage=40)]
        page_size, (group,) = it.cache.page_size, it.pool.spec.groups
        n_before = group.first_needed(20 // page_size, page_size) * page_size
        assert answers(it, [other]) == [CachedTokens(device=n_before, storage=20 - n_before)]


def test_conversations_that_part_have_their_own_answers(loaded: LoadedModel) -> None:
    """They part inside the window, and where no snapshot is."""
    shared = prompt(2 * WINDOW + 11)
    turns = [shared + prompt(WINDOW // 2, seed=n) for n in (1, 2)]
    with stepped_engine(loaded, chunk_tokens=WINDOW + 1, max_running=2) as it:
        for n_turn in range(3):
            cached = answers(it, turns)
            assert n_turn == 0 or min(each.device for each in cached) > len(turns[0]) - 20
            turns = [
                turn + list(plain(loaded, turn, N_NEW)) + prompt(3, seed=len(turn) + n)
                for n, turn in enumerate(turns)
            ]


@pytest.mark.parametrize("chunk_tokens", [5, 24])
def test_a_long_prompt_holds_the_pages_of_its_last_window_only(chunk_tokens: int) -> None:
    """As soon as the host has the others, however short or long the chunks are."""
    long = prompt(20 * WINDOW + 3)
    with stepped_engine(loaded_model("gemma3n"), chunk_tokens=chunk_tokens, max_running=1) as it:
        group, held = it.pool.spec.groups[0], it.cache.parts.groups[0].held
        asked = it.ask(long, greedy(N_NEW))
        n_steps = 0
        while not it.outputs[asked]:
            it.step()
            assert it.cache.flush(20.0)
            (task,) = it.scheduler._running.values()
            n_pages = task.n_computed // it.pool.page_size
            n_needed = n_pages - group.first_needed(n_pages, it.pool.page_size)
            assert held.n_device_units == n_needed
            n_steps += 1
        assert n_steps >= len(long) // chunk_tokens
        it.run()
        assert it.tokens(asked) == plain(it.loaded, long, N_NEW)
        again = [long, long[: 10 * WINDOW]]
        assert [each.total for each in answers(it, again)] == [200, 96]


def test_a_request_whose_units_do_not_arrive_computes_everything(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt(43)]
    with stepped_engine(loaded) as it:
        answers(it, prompts)
        empty_device(it)
        FailingLoads(it, monkeypatch, 1)
        assert answers(it, prompts) == [CachedTokens()]
        assert it.scheduler.tally.restarted == 1


@pytest.mark.parametrize("chunk_tokens", [1, WINDOW, 3 * WINDOW])
def test_a_request_alone_ends_in_the_units_that_one_is_said_to_need(chunk_tokens: int) -> None:
    """While it decodes, it has the window of its prompt beside that of its answer."""
    loaded = loaded_model("gemma3")
    (group,) = kv_spec_of(loaded.model, "x").groups
    asked, n_new = prompt(43), 2 * WINDOW
    n_units = units_needed(group, 64 * PAGE_SIZE, chunk_tokens, PAGE_SIZE)
    with stepped_engine(loaded, n_units=n_units, chunk_tokens=chunk_tokens) as it:
        request_id = it.ask(asked, greedy(n_new))
        it.run(200)
        assert it.tokens(request_id) == plain(loaded, asked, n_new)


@pytest.mark.parametrize(("policy", "n_units"), [("write_through", 9), ("write_back", 13)])
def test_preempted_and_offloaded_while_decoding_answers_stay_the_same(
    loaded: LoadedModel, policy: str, n_units: int
) -> None:
    prompts = [prompt(8 + 2 * n, seed=n) for n in range(3)]
    config = cache_config(hicache_write_policy=policy, hicache_storage_backend="memory")
    with stepped_engine(
        loaded,
        n_pages=13,
        n_units=n_units,
        cache=config,
        max_running=3,
        chunk_tokens=7,
        offload_stride=1,
    ) as it:
        asked = [it.ask(prompt, greedy(16)) for prompt in prompts]
        it.run()
        for request_id, prompt_ in zip(asked, prompts, strict=True):
            assert it.tokens(request_id) == plain(loaded, prompt_, 16)
        assert it.scheduler.tally.failed == 0
        if n_units == 13:
            assert it.scheduler.tally.preempted > 0
