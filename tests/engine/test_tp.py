"""An engine on several ranks: real processes, gloo on the loopback."""

from __future__ import annotations

from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.orders import Abort, Add, Call, StepOrders, decode, encode
from hicache_core.engine.request import Bootstrap, Request, SamplingParams
from hicache_core.engine.shard import check_split
from hicache_core.errors import ConfigError, UseAfterClose
from hicache_core.integrations.model_spec import full_kv_spec_of
from hicache_core.integrations.transformers import fingerprint_of_model
from hicache_core.kv.keys import storage_namespace
from hicache_core.types import CachedTokens, Namespace
from tests.engine.test_engine import Client, request
from tests.engine.tp_world import (
    PATIENCE_S,
    WITH_WINDOWS,
    engine_of_ranks,
    sharded_logits,
    split_model,
)
from tests.engine.world import PAGE_SIZE, greedy, plain, prompt_of
from tests.fork_server import CONTEXT
from tests.page_path.tiny_models import tiny_model

WHOLE = LoadedModel("llama", split_model(), None)
PROMPT = prompt_of(21)


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Runs before any test looks at its descriptors."""
    forkserver.ensure_running()


def asked(engine: Any, prompt: list[int], sampling: SamplingParams | None = None) -> Client:
    """A request that has ended."""
    client = Client()
    engine.submit(request("r", prompt, sampling), client)
    client.wait()
    return client


def in_file(path: Path) -> dict[str, Any]:
    """Settings of a cache with a file store."""
    return {"hicache_storage_backend": "file", "extra": {"path": str(path)}}


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "windows"]
)
def test_two_halves_of_a_model_compute_what_the_whole_does(
    architecture: str, tmp_path: Path
) -> None:
    pipes = [CONTEXT.Pipe() for _ in range(2)]
    args = (f"file://{tmp_path / 'meeting'}", architecture)
    processes = [
        CONTEXT.Process(target=sharded_logits, args=(rank, *args, pipes[rank][1]))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    answers = []
    for ours, theirs in pipes:
        theirs.close()
        assert ours.poll(PATIENCE_S)
        answers.append(ours.recv())
        ours.close()
    for process in processes:
        process.join()
        process.close()
    (heads, whole, first), (other_heads, _, second) = answers
    n_mine = 1 if architecture in WITH_WINDOWS else 2
    assert heads == {(0, n_mine, 2 * n_mine)}, "in each group of layers"
    assert other_heads == {(n_mine, 2 * n_mine, 2 * n_mine)}
    np.testing.assert_allclose(first, whole, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("heads", "n_ranks", "said"),
    [
        ((9, 3), 2, "3 KV heads, 9 query heads.* possible: --tp 1 or 3"),
        ((8, 4), 8, "possible: --tp 1 or 2 or 4"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(
    heads: tuple[int, int], n_ranks: int, said: str
) -> None:
    n_heads, n_kv_heads = heads
    model = tiny_model(
        "llama",
        hidden_size=8 * n_heads,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        intermediate_size=96,
    )
    check_split(model.config, n_kv_heads)
    with pytest.raises(ConfigError, match=said):
        check_split(model.config, n_ranks)


def test_an_architecture_that_nobody_has_tried_is_refused() -> None:
    config = split_model().config
    config.model_type = "novel"
    with pytest.raises(ConfigError, match=r"type novel cannot be split.* --tp 1"):
        check_split(config, 2)


def test_orders_arrive_as_they_were_given() -> None:
    full = Request(
        "a",
        (1, 2),
        SamplingParams(stop=("x", "é"), stop_token_ids=(3,), seed=7),
        Namespace(cache_salt="s"),
        priority=2,
        bootstrap=Bootstrap("node", 5, 6),
    )
    call = Call("attach_storage", ("file", {"path": "p"}))
    orders = (Add(full, 3, 9, 4), Abort("b"), call)
    given = StepOrders(orders, closing=True, is_over=True, drain_s=1.5)
    assert decode(encode(given)) == given
    assert encode(StepOrders()) == ""
    assert decode("") == StepOrders()


def test_answers_are_those_of_one_rank_from_every_tier(tmp_path: Path) -> None:
    """Device, host and, after a restart, storage; each rank stores its own heads."""
    store, answer = tmp_path / "store", plain(WHOLE, PROMPT, 8)
    with engine_of_ranks(2, tmp_path, cache=in_file(store), device_tokens=64) as it:
        cold, warm = asked(it.engine, PROMPT), asked(it.engine, PROMPT)
        assert cold.tokens == warm.tokens == answer
        assert cold.outputs[-1].cached == CachedTokens()
        assert warm.outputs[-1].cached == CachedTokens(device=20)
        for seed in (1, 2):  # no page of the first prompt stays on the device
            other = prompt_of(50, seed=seed)
            assert asked(it.engine, other, greedy(4)).tokens == plain(WHOLE, other, 4)
        from_host = asked(it.engine, PROMPT)
        assert from_host.tokens == answer
        assert from_host.outputs[-1].cached == CachedTokens(host=20)
    assert it.engine.status().error == ""
    spec = full_kv_spec_of(WHOLE.model, fingerprint_of_model(WHOLE.model))
    layout = HiCacheConfig().hicache_mem_layout
    namespaces = {
        storage_namespace(spec.shard(heads=heads).identity(), PAGE_SIZE, layout)
        for heads in ((0, 2), (2, 4))
    }
    stored = b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file())
    assert all(stored.count(f"{namespace}/".encode()) >= 5 for namespace in namespaces)
    assert stored.count(f"{storage_namespace(spec.identity(), PAGE_SIZE, layout)}/".encode()) == 0
    with engine_of_ranks(2, tmp_path, cache=in_file(store)) as it:
        again = asked(it.engine, PROMPT)
        assert again.tokens == answer
        assert again.outputs[-1].cached == CachedTokens(storage=20)


def test_with_head_groups_other_numbers_of_ranks_find_the_same_pages(tmp_path: Path) -> None:
    cache = {"storage_head_group": 1, **in_file(tmp_path / "store")}
    for n_ranks, cached in ((2, 0), (1, 20), (4, 20)):
        with engine_of_ranks(n_ranks, tmp_path, cache=cache) as it:
            client = asked(it.engine, PROMPT)
        assert client.tokens == plain(WHOLE, PROMPT, 8)
        assert client.outputs[-1].cached == CachedTokens(storage=cached)


def test_many_at_once_by_chance_are_answered_as_alone(tmp_path: Path) -> None:
    """Chunks, batches and preemptions go alike on both ranks."""
    prompts = [prompt_of(9 + 4 * n, seed=n) for n in range(6)]
    chance = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5)
    with engine_of_ranks(2, tmp_path, device_tokens=80, chunk_tokens=8, max_running=4) as it:
        clients = [Client() for _ in prompts]
        for n, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
            it.engine.submit(request(f"r{n}", prompt, greedy(12)), client)
        for prompt, client in zip(prompts, clients, strict=True):
            client.wait()
            assert client.tokens == plain(WHOLE, prompt, 12)
        assert asked(it.engine, PROMPT, chance).tokens == asked(it.engine, PROMPT, chance).tokens
        it.engine.call(lambda cache: cache.check_integrity(), PATIENCE_S)


def test_a_load_that_fails_on_one_rank_starts_over_on_all(tmp_path: Path) -> None:
    """The rank whose copy failed goes on with the forward: the others wait for its part."""
    with engine_of_ranks(2, tmp_path, device_tokens=64, n_broken_loads=1) as it:
        asked(it.engine, PROMPT)
        asked(it.engine, prompt_of(50, seed=1), greedy(4))
        asked(it.engine, prompt_of(50, seed=2), greedy(4))
        client = asked(it.engine, PROMPT)
        assert client.tokens == plain(WHOLE, PROMPT, 8)
        assert client.outputs[-1].cached == CachedTokens()
        assert it.engine._scheduler.tally.restarted == 1


POISON = PROMPT[10]


def test_an_error_on_all_ranks_ends_the_request_on_all_of_them(tmp_path: Path) -> None:
    bad, client = Client(), Client()
    other = [token for token in prompt_of(30, seed=1) if token != POISON][:13]
    with engine_of_ranks(2, tmp_path, poison=(POISON, "all")) as it:
        it.engine.submit(request("r", other), client)
        it.engine.submit(request("bad", PROMPT), bad)
        assert "NoLuckError" in bad.wait().error
        client.wait()
        assert client.tokens == plain(WHOLE, other, 8)
        assert asked(it.engine, other).tokens == plain(WHOLE, other, 8)
        assert it.engine.status().used_slots == 0


@pytest.mark.parametrize("where", ["first", "other"])
def test_an_error_on_one_rank_ends_all_of_them_soon(tmp_path: Path, where: str) -> None:
    """The others may wait for its part of the forward: they cannot go on together."""
    with engine_of_ranks(2, tmp_path, poison=(POISON, where)) as it:
        last = asked(it.engine, PROMPT).outputs[-1]
        assert last.finish_reason == "error"
        assert "RankLost" in last.error
        it.engine.join()
        for process in it.processes:
            process.join(PATIENCE_S / 2)
            assert process.exitcode == 1


def test_a_client_that_leaves_ends_its_request_on_all_ranks(tmp_path: Path) -> None:
    with engine_of_ranks(2, tmp_path) as it:
        left = Client()
        it.engine.submit(request("left", prompt_of(9), greedy(400)), left)
        left.wait(3)
        it.engine.abort("left")
        assert left.wait().finish_reason == "abort"
        assert asked(it.engine, PROMPT).tokens == plain(WHOLE, PROMPT, 8)
        assert it.engine.status().used_slots == 0


def test_the_operator_changes_storage_and_empties_the_cache_on_all_ranks(tmp_path: Path) -> None:
    path = {"path": str(tmp_path / "store")}
    with engine_of_ranks(2, tmp_path) as it:
        call = it.engine.call_all
        attaching = call("attach_storage", "file", path, timeout_s=PATIENCE_S)
        assert asked(it.engine, PROMPT).tokens == plain(WHOLE, PROMPT, 8)
        assert attaching.done
        assert not attaching.error
        asked(it.engine, PROMPT)
        assert call("flush", PATIENCE_S, timeout_s=PATIENCE_S)
        assert call("reset", timeout_s=PATIENCE_S)
        assert asked(it.engine, PROMPT).outputs[-1].cached == CachedTokens(storage=20)
        assert call("flush", PATIENCE_S, timeout_s=PATIENCE_S)  # what is being stored is in use
        call("detach_storage", timeout_s=PATIENCE_S)
        assert call("reset", timeout_s=PATIENCE_S)
        assert asked(it.engine, PROMPT).outputs[-1].cached == CachedTokens()
        with pytest.raises(ConfigError, match="close is not for all ranks"):
            call("close", timeout_s=PATIENCE_S)


def test_a_store_is_cleared_of_the_objects_of_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with engine_of_ranks(2, tmp_path, cache=in_file(path)) as it:
        for _ in range(2):
            asked(it.engine, PROMPT)
            assert it.engine.call_all("flush", PATIENCE_S, timeout_s=PATIENCE_S)
            clearing = it.engine.call_all("clear_storage", timeout_s=PATIENCE_S)
            while not clearing.done:
                it.engine.call(lambda cache: None, PATIENCE_S)
            # seven whole pages of each rank, and what says whose they are
            assert (clearing.n_objects, clearing.error) == (14 + 2, "")
            assert it.engine.call_all("reset", timeout_s=PATIENCE_S)
            assert asked(it.engine, PROMPT).outputs[-1].cached == CachedTokens()
        it.engine.call_all("detach_storage", timeout_s=PATIENCE_S)
        with pytest.raises(ConfigError, match="no storage backend is attached"):
            it.engine.call_all("clear_storage", timeout_s=PATIENCE_S)


def test_a_prompt_is_warmed_on_all_ranks(tmp_path: Path) -> None:
    with engine_of_ranks(2, tmp_path, cache=in_file(tmp_path / "store")) as it:
        call = it.engine.call_all
        asked(it.engine, PROMPT)
        assert call("flush", PATIENCE_S, timeout_s=PATIENCE_S)
        assert call("reset", timeout_s=PATIENCE_S)
        warming = call("warm", "warm", PROMPT, [None] * 4, timeout_s=PATIENCE_S)
        while not warming.done:
            it.engine.call(lambda cache: None, PATIENCE_S)
        assert warming.shortfall is None
        assert call("finish_prefetch", "warm", timeout_s=PATIENCE_S) == 20
        assert asked(it.engine, PROMPT).outputs[-1].cached == CachedTokens(host=20)


def test_a_listener_of_one_rank_alone_is_refused(tmp_path: Path) -> None:
    with engine_of_ranks(2, tmp_path) as it:
        listener: Any = object()
        with pytest.raises(ConfigError, match="a listener on each of them"):
            it.engine.listen(listener)


def test_a_rank_that_is_killed_ends_every_request_with_an_error(tmp_path: Path) -> None:
    with engine_of_ranks(2, tmp_path) as it:
        client = Client()
        it.engine.submit(request("r", prompt_of(9), greedy(400)), client)
        client.wait(3)
        it.processes[0].kill()
        last = client.wait()
        assert last.finish_reason == "error"
        assert "RankLost" in last.error
        assert "rank 1" in last.error
        it.engine.join()
        with pytest.raises(UseAfterClose, match="the engine has stopped: RankLost"):
            it.engine.submit(request("s", PROMPT), Client())


def test_an_idle_engine_notices_that_a_rank_is_gone(tmp_path: Path) -> None:
    with engine_of_ranks(2, tmp_path) as it:
        it.processes[0].kill()
        it.engine.join()
        assert "RankLost" in it.engine.status().error
