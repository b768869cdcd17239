"""Whatever a body is, the server answers, and never with 500."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hicache_core.server.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    SamplingBody,
    TokenizeBody,
)
from tests.server.world import server

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.integers(-2, 40)
    | st.floats(allow_nan=True)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "", "x"])},
        optional={"content": st.text(max_size=8) | VALUES},
    ),
    max_size=3,
)
GOOD = {
    "input_ids": st.lists(st.integers(-1, 60), max_size=6),
    "text": st.text(max_size=20),
    "prompt": st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=3),
    "messages": MESSAGES,
    "tokens": st.lists(st.integers(-1, 60), max_size=6),
    "max_tokens": st.integers(-1, 8),
    "max_completion_tokens": st.integers(-1, 8),
    "stream": st.booleans(),
}
SAMPLING = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(-1, 8)},
    optional={key: VALUES for key in SamplingBody.model_fields if key != "max_new_tokens"},
)


def bodies(model: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of the body as they should be, some as they should not."""
    fields = {key: GOOD.get(key, VALUES) | VALUES for key in model.model_fields}
    if "sampling_params" in fields:
        fields["sampling_params"] = SAMPLING | VALUES
    return st.fixed_dictionaries({}, optional=fields)


CALLS = st.one_of(
    st.tuples(st.just("/generate"), bodies(GenerateBody)),
    st.tuples(st.just("/v1/completions"), bodies(CompletionBody)),
    st.tuples(st.just("/v1/chat/completions"), bodies(ChatBody)),
    st.tuples(st.just("/tokenize"), bodies(TokenizeBody)),
    st.tuples(st.just("/detokenize"), bodies(DetokenizeBody)),
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(CALLS, min_size=10, max_size=30), st.lists(st.binary(max_size=40), max_size=5))
def test_any_body_is_answered(calls: list[tuple[str, dict[str, Any]]], raw: list[bytes]) -> None:
    async def run() -> None:
        async with server(max_waiting=100) as s:
            for path, body in calls:
                answer = await s.client.post(path, content=json.dumps(body).encode())
                assert answer.status_code in (200, 400), answer.text
                if answer.status_code == 400:
                    assert answer.json()["error"]["message"]
            for content in raw:
                answer = await s.client.post("/generate", content=content)
                assert answer.status_code == 400
            assert (await s.client.get("/health")).status_code == 200
            s.engine.cache.check_integrity()

    asyncio.run(asyncio.wait_for(run(), 60))


NAMES = st.lists(st.tuples(st.text(min_size=1, max_size=40), st.text(max_size=20)), min_size=20)


@settings(max_examples=3, deadline=None)
@given(NAMES)
def test_any_name_and_salt_may_be_asked_for(asked: list[tuple[str, str]]) -> None:
    async def run() -> None:
        async with server() as s:
            for name, salt in asked:
                headers = {"x-hicache-salt": salt.encode("utf-8")}
                url = s.client.base_url.copy_with(raw_path=b"/hicache/explain/" + _quoted(name))
                answer = await s.client.get(url, headers=headers)
                assert answer.status_code == 404

    asyncio.run(asyncio.wait_for(run(), 60))


def _quoted(text: str) -> bytes:
    return b"".join(b"%%%02X" % byte for byte in text.encode("utf-8"))


def test_a_surrogate_is_no_text() -> None:
    with pytest.raises(ValueError, match="JSON"):
        GenerateBody.model_validate_json(b'{"text": "\\udfff"}')
