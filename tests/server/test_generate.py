"""``/generate`` and OpenAI's two calls: what a client sends and what it gets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.server.world import VOCAB, server

pytestmark = pytest.mark.anyio

IDS = list(range(3, 15))
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}


def events(response: httpx.Response) -> list[Any]:
    """The server-sent events of a stream, which must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


async def test_generate_answers_text_tokens_and_what_was_cached() -> None:
    async with server() as s:
        body = {"input_ids": IDS, "sampling_params": GREEDY, "rid": "mine"}
        first = (await s.client.post("/generate", json=body)).json()
        second = (await s.client.post("/generate", json=body)).json()
    assert first["output_ids"] == IDS[:4]
    assert first["meta_info"]["id"] == "mine"
    assert first["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    assert first["meta_info"]["prompt_tokens"] == 12
    assert first["meta_info"]["completion_tokens"] == 4
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == 12
    assert second["meta_info"]["cached_tokens_details"] == {"device": 12, "host": 0, "storage": 0}
    assert second["text"] == first["text"]


async def test_a_stream_of_generate_has_the_text_from_the_start() -> None:
    async with server() as s:
        body = {"input_ids": IDS, "sampling_params": GREEDY, "stream": True}
        pieces = events(await s.client.post("/generate", json=body))
    assert [piece["output_ids"] for piece in pieces] == [IDS[:n] for n in range(1, 5)]
    assert [p["meta_info"]["finish_reason"] is None for p in pieces] == [True] * 3 + [False]
    assert pieces[-1]["text"].startswith(pieces[0]["text"])


async def test_a_batch_is_answered_in_order_and_its_stream_says_which() -> None:
    async with server() as s:
        body = {"input_ids": [IDS, IDS[3:]], "sampling_params": GREEDY, "rid": "b"}
        answers = (await s.client.post("/generate", json=body)).json()
        pieces = events(await s.client.post("/generate", json={**body, "stream": True}))
    assert [a["output_ids"] for a in answers] == [IDS[:4], IDS[3:7]]
    assert [a["meta_info"]["id"] for a in answers] == ["b_0", "b_1"]
    last = {p["index"]: p["output_ids"] for p in pieces}
    assert last == {0: IDS[:4], 1: IDS[3:7]}


async def test_sampling_params_reach_the_engine() -> None:
    async with server() as s:
        params = {
            "max_new_tokens": 3,
            "min_new_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "stop": ["x", "y"],
            "stop_token_ids": [5],
            "sampling_seed": 11,
            "ignore_eos": True,
        }
        await s.client.post("/generate", json={"input_ids": IDS, "sampling_params": params})
        openai = {"prompt": IDS, "max_tokens": 3, "stop": "x", "seed": 11, "n": 2}
        await s.client.post("/v1/completions", json=openai)
    one, first, second = (request.sampling for request in s.engine.received)
    assert (one.max_new_tokens, one.min_new_tokens, one.temperature) == (3, 2, 0.5)
    assert (one.top_p, one.top_k, one.stop, one.stop_token_ids) == (0.9, 7, ("x", "y"), (5,))
    assert (one.seed, one.ignore_eos) == (11, True)
    assert (first.stop, first.temperature, first.seed, second.seed) == (("x",), 1.0, 11, 12)


async def test_without_a_limit_an_answer_fills_the_context() -> None:
    async with server() as s:
        messages = [{"role": "user", "content": "hello"}]
        answer = (await s.client.post("/v1/chat/completions", json={"messages": messages})).json()
        n_prompt = answer["usage"]["prompt_tokens"]
        assert answer["usage"]["completion_tokens"] == 512 - n_prompt
        long = {"input_ids": [3] * 500}
        answer = (await s.client.post("/generate", json=long)).json()
    assert answer["meta_info"]["completion_tokens"] == 12


async def test_chat_and_completions_have_the_shape_that_openai_gives_them() -> None:
    async with server(enable_cache_report=True) as s:
        parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " this ?"}]
        messages = [
            {"role": "developer", "content": "system"},
            {"role": "user", "content": parts},
        ]
        body = {"model": "whatever", "messages": messages, "max_tokens": 3}
        chat = (await s.client.post("/v1/chat/completions", json=body)).json()
        body = {"prompt": [IDS, IDS], "max_tokens": 2, "return_cached_tokens_details": True}
        text = (await s.client.post("/v1/completions", json=body)).json()
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["choices"][0]["finish_reason"] == "length"
    usage = chat["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert [choice["index"] for choice in text["choices"]] == [0, 1]
    details = text["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == 12
    assert details["cached_tokens_details"] == {"device": 12, "host": 0, "storage": 0}
    assert text["sglext"]["cached_tokens_details"] == details["cached_tokens_details"]


async def test_usage_says_nothing_of_the_cache_unless_it_was_asked_to_report() -> None:
    async with server() as s:
        text = (await s.client.post("/v1/completions", json={"prompt": IDS})).json()
    assert "prompt_tokens_details" not in text["usage"]


@pytest.mark.parametrize("n", [1, 2])
async def test_an_openai_stream_ends_with_usage_if_asked(n: int) -> None:
    async with server() as s:
        messages = [{"role": "user", "content": "hello"}]
        body = {
            "messages": messages,
            "max_tokens": 3,
            "n": n,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        *pieces, last = events(await s.client.post("/v1/chat/completions", json=body))
    assert len({piece["id"] for piece in pieces}) == 1
    for index in range(n):
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in own] == [None, None, None, "length"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3 * n


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/generate", {}, "either text or input_ids"),
        ("/generate", {"text": "a", "input_ids": [1]}, "either text or input_ids"),
        ("/generate", {"input_ids": [-1]}, "token id -1 does not exist"),
        ("/generate", {"input_ids": [VOCAB]}, "does not exist"),
        ("/generate", {"input_ids": [3] * 512}, "512"),
        ("/generate", {"text": 5}, "text"),
        ("/generate", {"input_ids": [3], "sampling_params": {"max_new_tokens": -1}}, "max_new"),
        ("/generate", {"input_ids": [3], "sampling_params": {"max_new_tokens": 600}}, "600"),
        ("/generate", {"input_ids": [3], "sampling_params": {"temperature": -0.1}}, "temper"),
        ("/generate", {"input_ids": [3], "sampling_params": {"top_p": 0}}, "top_p"),
        ("/generate", {"input_ids": [3], "sampling_params": [{}, {}]}, "2 entries for 1"),
        ("/generate", {"input_ids": [[3], [4]], "rid": ["a"]}, "1 entries for 2"),
        ("/generate", {"input_ids": [3], "return_hidden_states": True}, "not supported"),
        ("/generate", {"input_ids": [3], "top_logprobs_num": 21}, "must be at most 20"),
        (
            "/generate",
            {"input_ids": [3], "return_logprob": True, "logprob_start_len": 1},
            "below the 1 tokens",
        ),
        ("/generate", {"input_ids": [3], "lora_path": "x"}, "not supported"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": IDS, "suffix": "x"}, "suffix is not supported"),
        ("/v1/completions", {"prompt": IDS, "logprobs": 21}, "must be at most 20"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            "needs logprobs: true",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "echo": True},
            "echo is not supported",
        ),
        ("/v1/completions", {"prompt": IDS, "min_tokens": 5, "max_tokens": 2}, "above the maximum"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "x", "content": ""}]}, "role"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "content"),
    ],
)
async def test_what_cannot_be_answered_is_400_and_says_why(
    path: str, body: dict[str, Any], said: str
) -> None:
    async with server() as s:
        response = await s.client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert s.engine.received == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"rid": "\\ud800", "input_ids": [3]}',
        b"[" * 100_000,
        b'{"input_ids": [1e400]}',
        b'{"input_ids": [' + b"9" * 5000 + b"]}",
        b'{"input_ids": [3], "sampling_params": {"temperature": NaN}}',
        b"null",
        b'"text"',
    ],
)
async def test_bytes_that_are_no_body_are_400(raw: bytes) -> None:
    async with server() as s:
        response = await s.client.post("/generate", content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == 400


async def test_a_body_beyond_the_limit_is_413_announced_or_not() -> None:
    async with server(max_body_nbytes=1000) as s:

        async def chunks() -> Any:
            for _ in range(20):
                yield b" " * 100

        announced = await s.client.post("/generate", content=b" " * 1001)
        streamed = await s.client.post("/generate", content=chunks())
    assert announced.status_code == streamed.status_code == 413


async def test_a_full_queue_is_503_with_a_time_to_try_again() -> None:
    async with server(max_waiting=1) as s:
        s.engine.gate.clear()
        body = {"input_ids": IDS, "sampling_params": GREEDY}
        first = asyncio.create_task(s.client.post("/generate", json=body))
        while not s.engine.received:
            await asyncio.sleep(0.001)
        for stream in (False, True):
            refused = await s.client.post("/generate", json={**body, "stream": stream})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
        batch = await s.client.post("/generate", json={**body, "input_ids": [IDS, IDS]})
        assert batch.status_code == 503
        s.engine.gate.set()
        assert (await first).status_code == 200


async def test_an_error_of_the_engine_is_500_and_in_a_stream_an_event() -> None:
    async with server() as s:
        s.engine.fails = "the device is gone"
        body = {"input_ids": IDS, "sampling_params": GREEDY}
        whole = await s.client.post("/generate", json=body)
        stream = await s.client.post("/generate", json={**body, "stream": True})
    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == "the device is gone"
    assert events(stream) == [whole.json()]


async def test_a_name_is_refused_while_it_is_in_use_and_free_afterwards() -> None:
    async with server() as s:
        s.engine.gate.clear()
        body = {"input_ids": IDS, "sampling_params": GREEDY, "rid": "mine"}
        first = asyncio.create_task(s.client.post("/generate", json=body))
        while not s.engine.received:
            await asyncio.sleep(0.001)
        again = await s.client.post("/generate", json=body)
        assert again.status_code == 400
        assert "still running" in again.json()["error"]["message"]
        s.engine.gate.set()
        assert (await first).status_code == 200
        assert (await s.client.post("/generate", json=body)).status_code == 200
    assert len({request.request_id for request in s.engine.received}) == 2


class Call:
    """A call as an ASGI server makes it, since httpx's transport never leaves."""

    def __init__(self, app: Any, path: str) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "scheme": "http",
            "http_version": "1.1",
            "asgi": {"version": "3.0"},
        }
        self.task = asyncio.create_task(app(scope, self.messages.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def say(self, kind: str, **fields: Any) -> None:
        self.messages.put_nowait({"type": f"http.{kind}", **fields})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_aborted(stream: bool) -> None:
    async with server() as s:
        s.engine.gate.clear()
        call = Call(s.app, "/generate")
        body = {"input_ids": IDS, "stream": stream, "rid": "mine"}
        call.say("request", body=json.dumps(body).encode())
        while not s.engine.received:
            await asyncio.sleep(0.001)
        call.say("disconnect")
        await call.task
        assert s.engine.aborted == {s.engine.received[0].request_id}
        s.engine.gate.set()
        again = await s.client.post("/generate", json={**body, "stream": False})
        assert again.status_code == 200  # the name is free


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours() -> None:
    async with server() as s:
        call = Call(s.app, "/generate")
        call.say("request", body=b'{"input', more_body=True)
        call.say("disconnect")
        await call.task
        assert call.sent[0]["status"] == 499
        assert s.engine.received == []
