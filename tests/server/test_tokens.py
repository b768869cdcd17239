"""Tokens of texts and texts of tokens; vLLM's reset; calls that are not there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.echo import CONTEXT
from tests.server.world import TOKENIZER, VOCAB, server

pytestmark = pytest.mark.anyio

TEXT = "the library of the keeper"
MESSAGES = [{"role": "user", "content": TEXT}]


async def test_a_text_has_the_tokens_that_a_completion_has() -> None:
    async with server() as s:
        answer = (await s.client.post("/tokenize", json={"prompt": TEXT})).json()
        await s.client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1})
        assert tuple(answer["tokens"]) == s.engine.received[0].tokens
    assert answer["count"] == len(answer["tokens"]) == 5
    assert answer["max_model_len"] == CONTEXT
    assert answer["token_strs"] is None


async def test_a_chat_has_the_tokens_that_its_answer_is_computed_from() -> None:
    """Also where the client says how its template ends."""
    going_on = [*MESSAGES, {"role": "assistant", "content": "the"}]
    async with server() as s:
        for body in (
            {"messages": MESSAGES},
            {"messages": MESSAGES, "add_generation_prompt": False},
            {"messages": going_on, "continue_final_message": True},
        ):
            answer = (await s.client.post("/tokenize", json=body)).json()
            chat = {**body, "max_tokens": 1}
            assert (await s.client.post("/v1/chat/completions", json=chat)).status_code == 200
            assert tuple(answer["tokens"]) == s.engine.received[-1].tokens


async def test_tokens_can_be_named_and_read_again() -> None:
    async with server() as s:
        body = {"prompt": TEXT, "return_token_strs": True}
        answer = (await s.client.post("/tokenize", json=body)).json()
        assert answer["token_strs"] == TOKENIZER.convert_ids_to_tokens(answer["tokens"])
        text = (await s.client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
        assert text == {"prompt": TOKENIZER.decode(answer["tokens"])}
        special = (await s.client.post("/detokenize", json={"tokens": [1, 2]})).json()
        assert special == {"prompt": "<start> <end>"}
        for body in ({"prompt": ""}, {"tokens": []}):
            path = "/tokenize" if "prompt" in body else "/detokenize"
            assert (await s.client.post(path, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "either prompt or messages"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{"a": 1}]}, "tools is not supported"),
        ("/tokenize", {"prompt": "a " * 100_000}, "holds at most"),
        ("/detokenize", {"tokens": [VOCAB]}, f"token id {VOCAB} does not exist"),
        ("/detokenize", {"tokens": "a"}, "tokens: must be a list"),
    ],
)
async def test_what_has_no_tokens_or_text_is_400(path: str, body: Any, said: str) -> None:
    async with server() as s:
        answer = await s.client.post(path, json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


async def test_vllms_reset_empties_the_cache_once_nothing_is_in_use() -> None:
    ids = list(range(3, 15))
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
    async with server() as s:
        for cached in (0, 12, 0):
            answer = (await s.client.post("/generate", json=body)).json()
            assert answer["meta_info"]["cached_tokens"] == cached
            if cached:
                answer = await s.client.post("/reset_prefix_cache")
                assert (answer.status_code, answer.content) == (200, b"")
        for wish in ("reset_external", "reset_running_requests"):
            answer = await s.client.post("/reset_prefix_cache", params={wish: "true"})
            assert answer.status_code == 400
            assert wish in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/messages", "/nothing"])
async def test_a_call_that_is_not_there_is_an_error_that_sdks_read(path: str) -> None:
    async with server() as s:
        answer = await s.client.post(path, json={"model": "x", "input": "hi"})
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 404
    assert error["type"] == "not_found_error"
    assert error["param"] is None
    assert f"POST {path}" in error["message"]
