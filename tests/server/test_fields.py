"""What a body asks for is honoured or refused in its own words; nothing is ignored in silence."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hicache_core.server.encoder import SHORT_NBYTES, Encoder
from hicache_core.server.fields import NOT_SUPPORTED, WITHOUT_EFFECT
from tests.no_threads import no_threads
from tests.server.echo import CONTEXT
from tests.server.world import TOKENIZER, server

pytestmark = pytest.mark.anyio

IDS = list(range(3, 15))
COMPLETION = {"prompt": IDS, "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
INTERNALS = ("function-after", "constrained", "list[", "SamplingBody", "Part", "validation", "~")
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


async def refusal(path: str, body: dict[str, Any]) -> str:
    """What the server says to a body that it does not take."""
    async with server() as s:
        answer = await s.client.post(path, json=body)
        assert s.engine.received == []
    assert answer.status_code == 400
    message: str = answer.json()["error"]["message"]
    assert not any(name in message for name in INTERNALS)
    return message


async def test_what_cannot_be_done_is_refused_by_name_on_every_path() -> None:
    async with server() as s:
        for name in NOT_SUPPORTED:
            for path, body in (
                ("/v1/completions", {**COMPLETION, name: {"a": 1}}),
                ("/v1/chat/completions", {**CHAT, name: {"a": 1}}),
                ("/generate", {"input_ids": IDS, "sampling_params": {name: {"a": 1}}}),
            ):
                answer = await s.client.post(path, json=body)
                assert answer.status_code == 400
                assert name in answer.json()["error"]["message"]
        assert s.engine.received == []


async def test_what_asks_for_nothing_is_taken() -> None:
    """SDKs send every field they know, with null or its default."""
    neutral = {name: values[0] if values else None for name, values in NOT_SUPPORTED.items()}
    of_some = {"echo", "logprobs", "tool_choice", "top_logprobs"}  # fields that have a type
    empty = {name: [] for name in NOT_SUPPORTED if name not in of_some}
    others = dict.fromkeys(WITHOUT_EFFECT, "x")
    unknown = {"something_new": None, "something_else": False}
    async with server() as s:
        for extra in (neutral, empty, others, unknown):
            for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
                answer = await s.client.post(path, json={**body, **extra})
                assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {**COMPLETION, "temprature": 0.5}, "did you mean 'temperature'?"),
        ("/generate", {"text": "a", "sampling_params": {"tempratur": 1}}, "sampling_params: temp"),
        ("/generate", {"input_ids": [[3]] * 65}, "at most 64 entries are allowed, got 65"),
        ("/v1/completions", {"prompt": ["a"] * 65}, "at most 64 entries are allowed, got 65"),
        ("/generate", {"input_ids": [3, "a"]}, "input_ids.1: must be an integer"),
        ("/generate", {"text": "a", "sampling_params": 3}, "sampling_params: must be an object"),
        ("/v1/completions", {**COMPLETION, "max_tokens": "2"}, "max_tokens: must be an integer"),
        ("/v1/completions", {**COMPLETION, "stop": [""]}, "stop.0: must not be empty"),
        ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tool_choice to none"),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ("/v1/chat/completions", {"messages": [{"role": "x", "content": ""}]}, "'assistant'"),
        (
            "/v1/chat/completions",
            {**CHAT, "continue_final_message": True, "add_generation_prompt": True},
            "contradict",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "only parts of the type text",
        ),
    ],
)
async def test_a_refusal_names_the_field_and_nothing_of_the_inside(
    path: str, body: dict[str, Any], said: str
) -> None:
    assert said in await refusal(path, body)


async def prompt_of(body: dict[str, Any]) -> str:
    """The prompt that a chat becomes, in words."""
    async with server() as s:
        answer = await s.client.post("/v1/chat/completions", json={**CHAT, **body})
        assert answer.status_code == 200, answer.text
        text: str = TOKENIZER.decode(s.engine.received[0].tokens)
    return text


async def test_a_chat_ends_as_its_client_asks() -> None:
    history = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the"}]
    whole = await prompt_of({"messages": history})
    assert whole.endswith("<start> assistant")
    assert (await prompt_of({"messages": history, "add_generation_prompt": False})).endswith(
        "<end>"
    )
    going_on = await prompt_of({"messages": history, "continue_final_message": True})
    assert going_on.endswith("the")


async def test_the_template_gets_the_variables_of_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ word }} {{ reasoning_effort }}")
    body = {"chat_template_kwargs": {"word": "library"}, "reasoning_effort": "library"}
    assert await prompt_of(body) == "library library"


async def test_a_history_of_tools_is_taken_and_nothing_in_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "the library"},
    ]
    async with server() as s:
        body = {**CHAT, "messages": history}
        assert (await s.client.post("/v1/chat/completions", json=body)).status_code == 200
        assert len(s.engine.received[0].tokens) > 20  # the call stands in the prompt as JSON
    one = "{% for m in messages %}{% for c in m.tool_calls %}library {% endfor %}{% endfor %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", one)
    assert await prompt_of({"messages": history}) == "library"
    picky = "{% for m in messages %}{{ raise_exception('no tools here') }}{% endfor %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", picky)
    assert "no tools here" in await refusal("/v1/chat/completions", {**CHAT, "messages": history})


async def test_special_tokens_are_skipped_unless_the_client_wants_them() -> None:
    async with server() as s:
        for extra in ({}, {"skip_special_tokens": False}):
            await s.client.post("/v1/completions", json={**COMPLETION, **extra})
    assert [r.sampling.skip_special_tokens for r in s.engine.received] == [True, False]


async def test_every_piece_of_a_stream_has_usage_if_asked() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**COMPLETION, "max_tokens": 3, "stream": True, "stream_options": options}
    async with server() as s:
        text = (await s.client.post("/v1/completions", json=body)).text
    pieces = [line for line in text.split("\n\n") if line.startswith("data: {")]
    assert [f'"completion_tokens": {n}' in piece for n, piece in enumerate(pieces, 1)][:3] == [
        True
    ] * 3


# Long prompts.


async def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = "the library " * 10_000
    async with server() as s:
        monkeypatch.setattr(type(TOKENIZER), "__call__", None)  # would fail if it were encoded
        for path, body in (
            ("/generate", {"text": long}),
            ("/v1/completions", {"prompt": long}),
            ("/v1/completions", {"prompt": [long, "a"]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ):
            answer = await s.client.post(path, json=body)
            assert answer.status_code == 400
            assert f"{CONTEXT} tokens holds at most" in answer.json()["error"]["message"]


@pytest.mark.parametrize("ids", [[3] * 200_000, ["a"] * 200_000, [[3] * 200_000]])
async def test_a_list_that_cannot_fit_is_refused_by_its_length(ids: list[Any]) -> None:
    said = await refusal("/generate", {"input_ids": ids})
    assert f"200000 tokens; with an answer, this server's context holds {CONTEXT}" in said


async def test_a_short_text_does_not_wait_for_a_long_one() -> None:
    encoder = Encoder(TOKENIZER, 100_000)
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def stuck(_tokenizer: Any) -> None:
        asyncio.run_coroutine_threadsafe(done.wait(), loop).result()

    try:
        long = asyncio.create_task(encoder.aside(stuck, SHORT_NBYTES + 1))
        assert await encoder.encode("the library", special=True)
        assert not long.done()
        done.set()
        await long
    finally:
        done.set()
        encoder.close()


async def test_texts_are_encoded_while_no_thread_can_be_started() -> None:
    encoder = Encoder(TOKENIZER, 100_000)
    try:
        with no_threads("hicache-encode"):
            assert await encoder.encode("the library", special=True)
            assert await encoder.encode("the library " * SHORT_NBYTES, special=True)
    finally:
        encoder.close()
