"""Log probabilities and echoes, as evaluators ask for them; a prompt without an answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import TokenLogprobs
from hicache_core.server.logprobs import LEAST, TokenTexts, completion_logprobs
from hicache_core.server.settings import Disaggregation
from tests.server.tiny import ROOM, TinyServer, tiny_server
from tests.server.world import server

pytestmark = pytest.mark.anyio

PROMPT = [3 + n % 40 for n in range(30)]
TEXT = "the keeper of the library"
MESSAGES = [{"role": "user", "content": TEXT}]
PAGE = 8


@pytest.fixture
async def tiny(tiny_chat: LoadedModel) -> AsyncIterator[TinyServer]:
    flags = ["--model-path", "tiny", "--page-size", str(PAGE), "--enable-cache-report", *ROOM]
    async with tiny_server(tiny_chat, [*flags, "--chunked-prefill-size", "7"]) as s:
        yield s


async def post(s: TinyServer, path: str, body: dict[str, Any]) -> Any:
    return (await s.client.post(path, json=body)).raise_for_status().json()


async def pieces(s: TinyServer, path: str, body: dict[str, Any]) -> list[Any]:
    text = (await s.client.post(path, json={**body, "stream": True})).raise_for_status().text
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


def expected_of(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Log probabilities of each next token, by a forward without a cache."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([tokens]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


async def test_multiple_choice_reads_the_prompt_with_an_echo(
    tiny: TinyServer, tiny_chat: LoadedModel
) -> None:
    """The form of lm-eval: one new token, whose place in the lists is the last."""
    body = {"prompt": [PROMPT, PROMPT[:9]], "max_tokens": 1, "logprobs": 1, "echo": True}
    for _ in range(2):  # the second time the prompts are cached
        answer = await post(tiny, "/v1/completions", {**body, "temperature": 0})
        for prompt, choice in zip(body["prompt"], answer["choices"], strict=True):
            found = choice["logprobs"]
            assert {len(of) for of in found.values()} == {len(prompt) + 1}
            assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
            rows = expected_of(tiny_chat, prompt)
            own = [float(rows[n, token]) for n, token in enumerate(prompt[1:])]
            assert found["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-4)
            best = rows.max(-1).values.tolist()
            told = [max(each.values()) for each in found["top_logprobs"][1:]]
            assert told == pytest.approx(best, abs=1e-4)
            assert found["token_logprobs"][-1] == told[-1]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    others = await post(tiny, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
    assert others["usage"]["prompt_tokens_details"]["cached_tokens"] == 24


async def test_an_echo_is_the_prompt_and_places_add_up(tiny: TinyServer) -> None:
    body = {"prompt": TEXT, "max_tokens": 3, "echo": True, "logprobs": 0, "ignore_eos": True}
    (choice,) = (await post(tiny, "/v1/completions", {**body, "seed": 3}))["choices"]
    assert choice["text"].startswith(TEXT)
    found = choice["logprobs"]
    assert len(found["tokens"]) == 5 + 3
    ends = [at + len(text) for at, text in zip(found["text_offset"], found["tokens"], strict=True)]
    assert found["text_offset"] == [0, *ends[:-1]]
    assert [len(top) for top in found["top_logprobs"][1:]] == [1] * 7  # the tokens themselves
    parts = await pieces(tiny, "/v1/completions", {**body, "seed": 3})
    choices = [part["choices"][0] for part in parts]
    assert "".join(each["text"] for each in choices) == choice["text"]
    for key in found:
        assert [one for each in choices for one in each["logprobs"][key]] == found[key]
    plain = await post(tiny, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "echo": True})
    assert plain["choices"][0]["logprobs"] is None
    assert plain["choices"][0]["text"].startswith(tiny_text(tiny, PROMPT))


def tiny_text(s: TinyServer, tokens: list[int]) -> str:
    text: str = s.engine._model.tokenizer.decode(tokens)
    return text


async def test_a_chat_tells_of_each_token_of_its_answer(
    tiny: TinyServer, tiny_chat: LoadedModel
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    body |= {"temperature": 0, "ignore_eos": True}
    await post(tiny, "/v1/chat/completions", body)  # from now on all hit alike, to the last bit
    (choice,) = (await post(tiny, "/v1/chat/completions", body))["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 4
    for one in content:
        assert one["top_logprobs"][0]["logprob"] == one["logprob"] <= 0
        assert bytes(one["bytes"]).decode() == one["token"]
        assert len(one["top_logprobs"]) == 2
    parts = await pieces(tiny, "/v1/chat/completions", body)
    told = [part["choices"][0]["logprobs"] for part in parts if part["choices"]]
    assert [one for each in told if each for one in each["content"]] == content
    without = {**body, "logprobs": False, "top_logprobs": 0}
    (choice,) = (await post(tiny, "/v1/chat/completions", without))["choices"]
    assert choice["logprobs"] is None


async def test_generate_has_sglangs_lists(tiny: TinyServer, tiny_chat: LoadedModel) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": greedy, "return_logprob": True}
    meta = (await post(tiny, "/generate", body))["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert [len(meta["output_token_logprobs"]), "output_top_logprobs" in meta] == [2, False]
    whole = {**body, "logprob_start_len": 10, "top_logprobs_num": 2}
    answer = await post(tiny, "/generate", {**whole, "return_text_in_logprobs": True})
    meta = answer["meta_info"]
    assert meta["cached_tokens"] == 8
    rows = expected_of(tiny_chat, PROMPT + answer["output_ids"])
    first, *rest = meta["input_token_logprobs"]
    assert first[:2] == [None, PROMPT[10]]
    assert meta["input_top_logprobs"][0] is None
    assert [one[1] for one in rest] == PROMPT[11:]
    own = [float(rows[10 + n, token]) for n, token in enumerate(PROMPT[11:])]
    assert [one[0] for one in rest] == pytest.approx(own, abs=1e-4)
    for own, top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert own == top[0]
        assert len(top) == 2
    assert all(isinstance(one[2], str) for one in meta["input_token_logprobs"])
    last = (await pieces(tiny, "/generate", whole))[-1]["meta_info"]
    assert last["input_token_logprobs"] == [
        [*one[:2], None] for one in meta["input_token_logprobs"]
    ]
    assert len(last["output_token_logprobs"]) == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 0}}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 0}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 0}),
    ],
)
async def test_a_prompt_without_an_answer_warms_the_cache(
    tiny: TinyServer, path: str, body: dict[str, Any]
) -> None:
    options = {"stream_options": {"include_usage": True}} if path != "/generate" else {}
    streamed = await pieces(tiny, path, {**body, **options})
    whole = await post(tiny, path, body)
    if path == "/generate":
        (first,) = streamed
        for answer in (first, whole):
            assert (answer["text"], answer["output_ids"]) == ("", [])
            assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
            assert "time_to_first_token" not in answer["meta_info"]
        cached = [answer["meta_info"]["cached_tokens"] for answer in (first, whole)]
    else:
        reasons = [piece["choices"][0]["finish_reason"] for piece in streamed[:-1]]
        assert reasons[-1] == whole["choices"][0]["finish_reason"] == "length"
        usages = [streamed[-1]["usage"], whole["usage"]]
        assert [usage["completion_tokens"] for usage in usages] == [0, 0]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, 8 if path == "/v1/chat/completions" else 24]


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("extra", [{"logprobs": 1}, {"max_tokens": 0}])
async def test_half_a_server_refuses_them(mode: str, extra: dict[str, int]) -> None:
    async with server(disaggregation=Disaggregation(mode)) as s:
        answer = await s.client.post("/v1/completions", json={"prompt": PROMPT, **extra})
        assert answer.status_code == 400
        assert "--disaggregation-mode" in answer.json()["error"]["message"]


async def test_a_refusal_says_which_field(tiny: TinyServer) -> None:
    for path, body, field in (
        ("/v1/completions", {"prompt": PROMPT, "suffix": "x"}, "suffix"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"a": 1}]}, "tools"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ("/generate", {"text": "a", "sampling_params": {"regex": "a"}}, "sampling_params"),
    ):
        answer = await tiny.client.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


class Words:
    """A tokenizer that drops the space at the beginning of a text, as SentencePiece's do."""

    words = ("a", " b", " b", "\ufffd")

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert (text, add_special_tokens) == ("a", False)
        return {"input_ids": [0]}

    def decode(self, tokens: list[int], **_options: bool) -> str:
        return "".join(self.words[token] for token in tokens).removeprefix(" ")


def test_a_token_has_the_text_that_it_has_inside_a_text() -> None:
    texts = TokenTexts(Words())
    assert [texts.of(token) for token in range(4)] == ["a", " b", " b", "\ufffd"]


def test_of_equal_texts_the_most_probable_is_told_and_minus_infinity_is_a_number() -> None:
    found = [TokenLogprobs(2, -float("inf"), ((1, -0.5), (2, -float("inf"))))]
    shown = completion_logprobs(found, TokenTexts(Words()), 7)
    assert shown == {
        "tokens": [" b"],
        "token_logprobs": [LEAST],
        "top_logprobs": [{" b": -0.5}],
        "text_offset": [7],
    }
