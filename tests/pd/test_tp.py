"""Real processes: prefill and decode nodes of one and of two ranks, every pair of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hicache_core.engine.model import LoadedModel
from tests.pd.cluster import PATIENCE_S, Child, Cluster
from tests.pd.reference import plain_answer
from tests.pd.scene import Shape, Turn, check_hits, check_tokens, ids_of, play

PAGE_SIZE = 8
TP = (2, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def cluster(tiny_folder: Path, store: Path) -> Iterator[Cluster]:
    """Nodes that store head by head, so that all of them share one store."""
    made = Cluster(
        str(tiny_folder),
        "file",
        {"path": str(store)},
        page_size=PAGE_SIZE,
        flags=["--max-total-tokens", "2048", "--storage-head-group", "1"],
        tp=(TP, TP),
    )
    yield made
    made.close()


def shape_of(tiny_chat: LoadedModel, **changes: int) -> Shape:
    return Shape(tiny_chat.model.config.vocab_size, PAGE_SIZE, **changes)


def check_answers(turns: list[Turn], tiny_chat: LoadedModel) -> None:
    """All of them are the plain model's."""
    check_tokens(turns, lambda prompt, n_new: plain_answer(tiny_chat, prompt, n_new))


def apart(
    prefill: Child | None, decode: Child, prompt: tuple[int, ...], address: str, room: int
) -> dict[str, Any]:
    """What ``decode`` answers, whose KV is ``prefill``'s if that is asked as well."""
    host, _, port = address.rpartition(":")
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
        **{"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": room},
    }
    nodes = [decode, *([] if prefill is None else [prefill])]
    with ThreadPoolExecutor(len(nodes)) as clients:
        asked = [
            clients.submit(httpx.post, f"{node.url}/generate", json=body, timeout=PATIENCE_S)
            for node in nodes
        ]
        answers = [future.result().raise_for_status().json() for future in asked]
    answer: dict[str, Any] = answers[0]
    return answer


def address_of(node: Child) -> str:
    """Where the KV of a prefill node is fetched: of its first rank."""
    address: str = node.get("/get_server_info")["disaggregation_transfer_address"]
    return address


def test_every_pair_of_one_and_two_ranks(cluster: Cluster, tiny_chat: LoadedModel) -> None:
    pairs = [(prefill, decode) for prefill in cluster.prefill for decode in cluster.decodes]
    nbytes = []
    for n, (prefill, decode) in enumerate(pairs):
        prompt = ids_of(shape_of(tiny_chat), 54, f"pair {n}")
        answer = apart(prefill, decode, prompt, address_of(prefill), n)
        assert answer["output_ids"] == plain_answer(tiny_chat, prompt, 8)
        figures = cluster.figures(decode)
        assert (figures["received"], figures["recomputed"]) == (n // 2 + 1, 0)
        nbytes.append(figures["nbytes"] // figures["received"])
    assert len(set(nbytes)) == 1, "the same rows, however many ranks move them"


def test_tokens_and_hits_of_four_conversations(cluster: Cluster, tiny_chat: LoadedModel) -> None:
    """What a decode node of two ranks generated is found by prefill nodes of two and of one."""
    shape = shape_of(tiny_chat, n_turns=3)
    turns = play(cluster, shape)
    check_answers(turns, tiny_chat)
    check_hits(turns, shape)
    assert {turn.prefill for turn in turns} == {node.url for node in cluster.prefill}
    figures = [cluster.figures(node) for node in cluster.decodes]
    assert [one["recomputed"] for one in figures] == [0, 0]
    assert min(one["received"] for one in figures) > 2


def test_storage_goes_and_comes_on_both_sides(
    cluster: Cluster, tiny_chat: LoadedModel, store: Path
) -> None:
    prefill, decode = cluster.prefill[0], cluster.decodes[0]
    attach = {
        "hicache_storage_backend": "file",
        "hicache_storage_backend_extra_config_json": json.dumps({"path": str(store)}),
    }
    for n, has_storage in enumerate((False, True)):
        for node in (prefill, decode):
            node.call("PUT" if has_storage else "DELETE", "/hicache/storage-backend", json=attach)
        prompt = ids_of(shape_of(tiny_chat), 50, f"storage {n}")
        answer = apart(prefill, decode, prompt, address_of(prefill), 50 + n)["output_ids"]
        assert answer == plain_answer(tiny_chat, prompt, 8)
        cluster.settle()
        prefill.call("POST", "/flush_cache", params={"timeout": PATIENCE_S})
        body = {"input_ids": [*prompt, *answer], "sampling_params": {"max_new_tokens": 1}}
        again = prefill.call("POST", "/generate", json=body).json()["meta_info"]
        # Of 58 tokens the last was never computed: seven whole pages.
        assert again["cached_tokens_details"]["storage"] == (56 if has_storage else 0)
        assert again["cached_tokens"] == (56 if has_storage else 0)


def test_a_rank_of_a_prefill_node_dies_while_its_kv_is_awaited(
    cluster: Cluster, tiny_chat: LoadedModel
) -> None:
    """Both decode nodes compute what they waited for; the router goes on with the other node."""
    broken = cluster.prefill[0]
    address = address_of(broken)
    prompts = [ids_of(shape_of(tiny_chat), 40, f"awaited {n}") for n in range(2)]
    with ThreadPoolExecutor(2) as clients:
        asked = [
            clients.submit(apart, None, decode, prompt, address, 100 + n)
            for n, (decode, prompt) in enumerate(zip(cluster.decodes, prompts, strict=True))
        ]
        for decode in cluster.decodes:
            cluster.wait_until(lambda: is_fetching(decode), "it waits for rows")  # noqa: B023
        broken.kill_rank(1)
        answers = [future.result()["output_ids"] for future in asked]
    assert answers == [plain_answer(tiny_chat, prompt, 8) for prompt in prompts]
    for decode in cluster.decodes:
        figures = cluster.figures(decode)
        assert figures["recomputed"] == 1
        assert "time" not in figures["last_error"], "it need not wait for its time to be over"
    turns = play(cluster, shape_of(tiny_chat, n_turns=1, n_user=23))
    check_answers(turns, tiny_chat)
    assert {turn.prefill for turn in turns} == {cluster.prefill[1].url}


def is_fetching(decode: Child) -> bool:
    """Whether a request of it has pages."""
    running: int = decode.get("/hicache/status")["engine"]["running"]
    return running > 0


def test_a_rank_of_a_decode_node_dies(cluster: Cluster, tiny_chat: LoadedModel) -> None:
    cluster.decodes[0].kill_rank(1)
    turns = play(cluster, shape_of(tiny_chat, n_turns=1, n_user=24))
    check_answers(turns, tiny_chat)
