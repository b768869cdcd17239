"""Windows on several ranks: each keeps its heads of them, and all decide alike on their units."""

from __future__ import annotations

import json
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from hicache_core.engine.limits import Limits
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import CachedTokens
from hicache_core.engine.shard import check_split, shard
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.errors import ConfigError
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.ranks.base import RankGroup
from tests.engine.test_engine import Client, request
from tests.engine.test_tp import asked, in_file
from tests.engine.tp_world import Ranks, engine_of_ranks, split_model
from tests.engine.windowed_models import WINDOW
from tests.engine.world import PAGE_SIZE, greedy, plain, prompt_of
from tests.page_path.mixed_models import mixed_model

PROMPT = prompt_of(5 * WINDOW + 3)
N_CACHED = len(PROMPT) // PAGE_SIZE * PAGE_SIZE
ROOMY = {"hicache_ratio": 4.0}
"""The host has room for all prompts of a test."""


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Runs before any test looks at its descriptors."""
    forkserver.ensure_running()


def whole(architecture: str) -> LoadedModel:
    """The model that answers alone."""
    return LoadedModel(architecture, split_model(architecture), None)


def check_alike(it: Ranks) -> None:
    """All ranks took the same pages and units in the same order, and nobody keeps one."""
    decisions = json.loads(it.decisions.text())
    assert [json.loads(other) for other in it.others] == [decisions] * len(it.processes)
    taken, end = decisions
    assert {at for at, _ in taken} == {0, 1}, "full pages and units of the window"
    assert end["lost"] == [0, 0]


@pytest.mark.parametrize("architecture", ["gemma3", "windows"])
def test_answers_are_those_of_one_rank_from_every_tier(architecture: str, tmp_path: Path) -> None:
    """In chunks that end inside the window. The model ``windows`` has no other layer."""
    alone, store = whole(architecture), {**ROOMY, **in_file(tmp_path / "store")}
    answer = plain(alone, PROMPT, 8)
    with engine_of_ranks(
        2, tmp_path, architecture=architecture, cache=store, device_tokens=64, chunk_tokens=5
    ) as it:
        assert [group.name for group in it.engine.pool.spec.groups] == ["swa"]
        cold, warm = asked(it.engine, PROMPT), asked(it.engine, PROMPT)
        assert cold.tokens == warm.tokens == answer
        assert cold.outputs[-1].cached == CachedTokens()
        assert warm.outputs[-1].cached == CachedTokens(device=N_CACHED)
        for seed in (1, 2):  # no page of the first prompt stays on the device
            other = prompt_of(50, seed=seed)
            assert asked(it.engine, other, greedy(4)).tokens == plain(alone, other, 4)
        from_host = asked(it.engine, PROMPT)
        assert from_host.tokens == answer
        assert from_host.outputs[-1].cached == CachedTokens(host=N_CACHED)
    check_alike(it)
    with engine_of_ranks(2, tmp_path, architecture=architecture, cache=store) as it:
        again = asked(it.engine, PROMPT)
        assert again.tokens == answer
        assert again.outputs[-1].cached == CachedTokens(storage=N_CACHED)
    check_alike(it)


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_many_at_once_are_answered_as_alone(policy: str, tmp_path: Path) -> None:
    """Chunks, batches and preemptions go alike on both ranks."""
    alone = whole("gemma3")
    prompts = [prompt_of(9 + 4 * n, seed=n) for n in range(6)]
    cache = {"hicache_write_policy": policy}
    settings: dict[str, Any] = {"device_tokens": 80, "chunk_tokens": 8, "max_running": 4}
    with engine_of_ranks(2, tmp_path, architecture="gemma3", cache=cache, **settings) as it:
        clients = [Client() for _ in prompts]
        for n, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
            it.engine.submit(request(f"r{n}", prompt, greedy(24)), client)
        for prompt, client in zip(prompts, clients, strict=True):
            client.wait()
            assert client.tokens == plain(alone, prompt, 24)
    check_alike(it)
    assert it.decisions.end["preempted"] > [0]


def test_a_load_that_fails_on_one_rank_starts_over_on_all(tmp_path: Path) -> None:
    """One of full pages, and one of units; the request after it has what it asks for."""
    alone = whole("gemma3")
    with engine_of_ranks(
        2, tmp_path, architecture="gemma3", cache=ROOMY, device_tokens=64, n_broken_loads=1
    ) as it:
        others = [prompt_of(50, seed=seed) for seed in (1, 2)]
        for prompt in (PROMPT, *others):
            asked(it.engine, prompt, greedy(4))
        for prompt, cached in ((PROMPT, 0), (others[0], 48)):
            client = asked(it.engine, prompt)
            assert client.tokens == plain(alone, prompt, 8)
            assert client.outputs[-1].cached == CachedTokens(host=cached)
    check_alike(it)
    assert it.decisions.end["restarted"] == [1]


def test_with_head_groups_windows_keep_all_their_pages(tmp_path: Path) -> None:
    """Objects that are cut by heads are those of full pages; so any number of ranks finds them."""
    alone = whole("gemma3")
    cache = {"storage_head_group": 1, **in_file(tmp_path / "store")}
    for cached in (0, N_CACHED):
        with engine_of_ranks(2, tmp_path, architecture="gemma3", cache=cache) as it:
            assert it.engine.pool.spec.groups == ()
            client = asked(it.engine, PROMPT)
        assert client.tokens == plain(alone, PROMPT, 8)
        assert client.outputs[-1].cached == CachedTokens(storage=cached)


class OtherRank(RankGroup):
    """One of two ranks; the other one says what it has."""

    rank, world_size, window = 0, 2, None

    def __init__(self, others: Sequence[int]) -> None:
        self._others = others

    def agree_min(self, values: Sequence[int]) -> list[int]:
        return list(map(min, values, self._others))

    def gather(self, text: str) -> list[str]:
        return [text, text]


def test_ranks_use_the_smallest_pool_of_each_group() -> None:
    limits = Limits(10 * PAGE_SIZE, 99, 512, frozenset(), (7, 5))
    agreed = limits.agreed(OtherRank([8, 9, 4]), PAGE_SIZE)
    assert (agreed.n_slots, agreed.n_units) == (8 * PAGE_SIZE, (7, 4))


def test_a_model_with_a_state_is_refused_on_several_ranks_and_whole_on_one(tmp_path: Path) -> None:
    model: Any = mixed_model("lfm3")
    with pytest.raises(ConfigError, match=r"a model of type \w+ cannot be split over 2 ranks"):
        check_split(model.config, 2)
    spec = kv_spec_of(model, "x")
    with TensorRanks.create(0, 1, f"file://{tmp_path / 'meeting'}") as ranks:
        assert shard(model, spec, ranks) == spec
