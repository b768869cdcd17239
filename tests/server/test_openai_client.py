"""OpenAI's own client, and SGLang's benchmark clients, against a real server process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.process import ServerProcess, server_process

QUESTION = "What is the first thing that the keeper does ? " * 12


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[ServerProcess]:
    """One server for the module; its last test stops it."""
    flags = ["--page-size", "8", "--enable-hierarchical-cache", "--enable-metrics"]
    flags += ["--enable-cache-report", "--max-total-tokens", "2048", "--served-model-name", "small"]
    with server_process(tiny_folder, flags, {"HICACHE_API_KEY": "the-key"}) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="the-key", max_retries=0, timeout=60) as client:
        yield client


def post(server: ServerProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": "Bearer the-key"}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 12,
        "temperature": 0,
    }
    first = client.chat.completions.create(**ask)
    pieces = list(
        client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == first.choices[0].message.content != ""
    assert first.choices[0].finish_reason in ("stop", "length")
    assert first.usage is not None
    usage = pieces[-1].usage
    assert usage is not None
    assert usage.completion_tokens == first.usage.completion_tokens
    details = usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens is not None
    assert 0 < details.cached_tokens == usage.prompt_tokens // 8 * 8


def test_completions_and_their_stream_say_the_same(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "small",
        "prompt": [QUESTION, "Who is it"],
        "max_tokens": 9,
        "temperature": 0.7,
        "seed": 5,
        "extra_body": {"cache_salt": "mine", "ignore_eos": True},
    }
    whole = client.completions.create(**ask)
    texts = ["", ""]
    for piece in client.completions.create(**ask, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 18


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


def test_refusals_are_the_clients_own_errors(server: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="small", prompt="a " * 9000)
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="small", prompt="a", suffix="b")
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


# The bodies of SGLang 0.5.23's bench_serving and bench_one_batch_server, and of bench_multiturn.
BENCHMARKS: list[tuple[str, dict[str, Any]]] = [
    (
        "/generate",
        {
            "text": QUESTION,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
            "stream": True,
            "lora_path": None,
            "return_logprob": False,
            "return_routed_experts": False,
            "logprob_start_len": -1,
        },
    ),
    (
        "/generate",
        {
            "text": QUESTION,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
            "stream": True,
            "lora_path": "",
            "return_logprob": False,
            "logprob_start_len": -1,
        },
    ),
    (
        "/generate",
        {
            "input_ids": [[3, 4, 5], [6, 7, 8]],
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": 4,
                "ignore_eos": True,
                "json_schema": None,
                "stream_interval": None,
            },
            "return_logprob": False,
            "stream": True,
        },
    ),
    (
        "/v1/completions",
        {
            "model": "small",
            "prompt": QUESTION,
            "best_of": 1,
            "max_tokens": 4,
            "stream": True,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_cached_tokens_details": True,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "small",
            "messages": [{"role": "user", "content": QUESTION}],
            "max_completion_tokens": 4,
            "stream": True,
            "temperature": 0.0,
            "ignore_eos": True,
        },
    ),
]


@pytest.mark.parametrize("stream", [True, False])
def test_the_bodies_of_sglangs_benchmarks_are_answered(server: ServerProcess, stream: bool) -> None:
    for path, body in BENCHMARKS:
        answer = post(server, path, {**body, "stream": stream})
        assert answer.status_code == 200, answer.text
        assert answer.text.endswith("data: [DONE]\n\n") == stream
        assert '"error"' not in answer.text
    info = httpx.get(f"{server.url}/server_info", headers={"Authorization": "Bearer the-key"})
    assert "last_gen_throughput" in info.json()["internal_states"][0]


def test_a_client_that_leaves_frees_the_engine(server: ServerProcess) -> None:
    """The stream is cut after its first piece; the engine then has nothing to do."""
    headers = {"Authorization": "Bearer the-key"}
    body = {
        "input_ids": list(range(3, 20)),
        "sampling_params": {"max_new_tokens": 1900, "ignore_eos": True},
        "stream": True,
    }
    url = f"{server.url}/generate"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as stream:
        next(stream.iter_bytes())
    state: dict[str, Any] = {}
    until = time.monotonic() + 60
    while not state or state["running"] or not state["aborted"]:
        assert time.monotonic() < until, state
        status = httpx.get(f"{server.url}/hicache/status", headers=headers, timeout=60)
        state = status.json()["engine"]
        time.sleep(0.02)


def test_the_end_of_a_server_lets_requests_finish(server: ServerProcess) -> None:
    """SIGTERM in the middle of an answer: the answer is whole, the exit status 0."""

    async def run() -> httpx.Response:
        headers = {"Authorization": "Bearer the-key"}
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            params = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 0}
            body = {"input_ids": [5, 6, 7], "sampling_params": params}
            call = asyncio.create_task(client.post(f"{server.url}/generate", json=body))
            state: dict[str, Any] = {"running": 0}
            while not state["running"] and not call.done():
                status = await client.get(f"{server.url}/hicache/status")
                state = status.json()["engine"]
            assert await asyncio.to_thread(server.stop) == 0
            return await call

    answer = asyncio.run(run())
    assert answer.status_code == 200
    assert answer.json()["meta_info"]["completion_tokens"] == 60
    assert not any("the-key" in line for line in server.lines)
