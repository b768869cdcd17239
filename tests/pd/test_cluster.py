"""Real processes: two prefill nodes, a decode node that offloads, a router, Valkey as storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hicache_core.engine.model import LoadedModel
from tests.pd.cluster import Cluster
from tests.pd.reference import plain_answer
from tests.pd.scene import Shape, check_hits, check_tokens, ids_of, play
from tests.servers.valkey import Valkey, running

PAGE_SIZE = 8


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tiny_folder: Path, valkey: Valkey) -> Iterator[Cluster]:
    made = Cluster(
        str(tiny_folder),
        "redis",
        {"url": valkey.url},
        page_size=PAGE_SIZE,
        flags=["--max-total-tokens", "2048"],
    )
    yield made
    made.close()


def test_tokens_and_hits_of_four_conversations(cluster: Cluster, tiny_chat: LoadedModel) -> None:
    shape = Shape(tiny_chat.model.config.vocab_size, PAGE_SIZE, n_turns=3)
    turns = play(cluster, shape)
    check_tokens(turns, lambda prompt, n_new: plain_answer(tiny_chat, prompt, n_new))
    check_hits(turns, shape)
    assert {turn.prefill for turn in turns} == {node.url for node in cluster.prefill}
    figures = cluster.figures(cluster.decode)
    assert (figures["received"], figures["recomputed"]) == (12, 0)
    assert sum(cluster.figures(node)["sent"] for node in cluster.prefill) == 12
    assert any(turn.cached.storage for turn in turns)
    cluster.settle()
    snapshot = cluster.decode.get("/hicache/status")["snapshot"]
    assert snapshot["transfers"][0]["outcomes"] == {"arrived": 12}
    assert snapshot["counters"]["store_skipped_pages"] > 0, "what a prefill node has stored"
    assert snapshot["host"]["free_pages"] == snapshot["host"]["n_pages"], "all of it is stored"
    metrics = httpx.get(f"{cluster.decode.url}/metrics").text
    arrived = [line for line in metrics.splitlines() if "total{" in line and '"arrived"' in line]
    assert [line.rsplit(" ", 1)[1] for line in arrived] == ["12.0"]


def test_a_prefill_node_is_killed_and_started_again(
    cluster: Cluster, tiny_chat: LoadedModel
) -> None:
    def between(turn: int) -> None:
        if turn == 1:
            cluster.kill_prefill(0)
        elif turn == 2:
            cluster.restart_prefill(0)

    shape = Shape(tiny_chat.model.config.vocab_size, PAGE_SIZE, n_turns=3, n_user=22)
    turns = play(cluster, shape, between)
    check_tokens(turns, lambda prompt, n_new: plain_answer(tiny_chat, prompt, n_new))
    assert {turn.prefill for turn in turns if turn.turn == 1} == {cluster.prefill[1].url}
    assert cluster.prefill[0].url in {turn.prefill for turn in turns if turn.turn == 2}


def test_a_stream_of_the_openai_form_goes_through(cluster: Cluster, tiny_chat: LoadedModel) -> None:
    shape = Shape(tiny_chat.model.config.vocab_size, PAGE_SIZE)
    body = {
        "model": "any",
        "prompt": list(ids_of(shape, 30, "stream")),
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    url = f"{cluster.router.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60.0) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 3
