"""The description at /openapi.json: every call, and each field with its bounds and forms."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hicache_core.server import (
    routes_admin,
    routes_generate,
    routes_info,
    routes_tokens,
    routes_warm,
)
from hicache_core.server.access import Keys
from hicache_core.server.bodies import (
    AttachBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
)
from hicache_core.server.routes_warm import WarmBody
from tests.server.world import server

pytestmark = pytest.mark.anyio

BODIES = {
    ("/generate", "post"): GenerateBody,
    ("/v1/completions", "post"): CompletionBody,
    ("/v1/chat/completions", "post"): ChatBody,
    ("/tokenize", "post"): TokenizeBody,
    ("/detokenize", "post"): DetokenizeBody,
    ("/hicache/storage-backend", "put"): AttachBody,
    ("/hicache/warm", "post"): WarmBody,
}


async def described() -> dict[str, Any]:
    async with server() as s:
        answer = await s.client.get("/openapi.json")
        description: dict[str, Any] = answer.raise_for_status().json()
        return description


def body_schema(description: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    content = description["paths"][path][method]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rpartition("/")[2]
    schema: dict[str, Any] = description["components"]["schemas"][name]
    return schema


async def test_every_call_has_a_sentence() -> None:
    description = await described()
    async with server() as s:
        paths = {
            route.path.replace(":path", "")
            for module in (
                routes_generate,
                routes_tokens,
                routes_info,
                routes_admin,
                routes_warm,
            )
            for route in module.make_router(s.service).routes
        }
    assert set(description["paths"]) == paths - {"/docs"}
    for call in description["paths"].values():
        for operation in call.values():
            assert operation["description"].endswith(".")


@pytest.mark.parametrize(("path", "method"), BODIES)
async def test_every_field_of_a_body_is_described(path: str, method: str) -> None:
    properties = body_schema(await described(), path, method)["properties"]
    assert set(properties) == set(BODIES[path, method].model_fields)


async def test_bounds_and_forms_are_those_that_the_server_checks() -> None:
    schema = body_schema(await described(), "/v1/completions", "post")["properties"]
    top_p, _null = schema["top_p"]["anyOf"]
    assert (top_p["exclusiveMinimum"], top_p["maximum"]) == (0, 1)
    forms = [
        (form["type"], form.get("items", {}).get("type")) for form in schema["prompt"]["oneOf"]
    ]
    assert forms == [("string", None), *(("array", of) for of in ("string", "integer", "array"))]
    async with server() as s:
        for value, status in ((1, 200), (0, 400), (1.01, 400)):
            body = {"prompt": [3, 4], "top_p": value}
            assert (await s.client.post("/v1/completions", json=body)).status_code == status


async def test_errors_have_the_shape_that_is_described() -> None:
    description = await described()
    schemas = description["components"]["schemas"]
    responses = description["paths"]["/generate"]["post"]["responses"]
    for group in ("4XX", "5XX"):
        shown = responses[group]["content"]["application/json"]["schema"]["$ref"]
        assert shown.endswith("/ErrorAnswer")
    async with server() as s:
        for answer in (
            await s.client.post("/generate", json={}),
            await s.client.get("/flush_cache", params={"timeout": "x"}),
        ):
            assert answer.status_code == 400
            assert set(answer.json()) == set(schemas["ErrorAnswer"]["properties"])
            assert set(answer.json()["error"]) == set(schemas["ErrorDetail"]["properties"])


async def test_the_description_asks_for_the_key() -> None:
    async with server(keys=Keys(api="the-key")) as s:
        own = {"Authorization": "Bearer the-key"}
        for path in ("/openapi.json", "/docs"):
            assert (await s.client.get(path)).status_code == 401
            assert (await s.client.get(path, headers=own)).status_code == 200


async def test_the_page_has_every_call_and_field_and_loads_nothing() -> None:
    description = await described()
    async with server() as s:
        answer = await s.client.get("/docs")
    page = answer.text
    for path, call in description["paths"].items():
        for method in call:
            assert f"<code>{method.upper()} {path}</code>" in page
    for name, schema in description["components"]["schemas"].items():
        assert f"<h2 id={name}>" in page
        for field in schema["properties"]:
            assert f"<td><code>{field}</code>" in page
    assert "number (more than 0, at most 1)" in page
    assert "list of" in page
    assert not re.findall(r"<script|src=|https?:|@import|url\(", page)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_is_json_whatever_its_content_type(content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    body = b'{"input_ids": [3, 4], "sampling_params": {"max_new_tokens": 1}}'
    async with server() as s:
        answer = await s.client.post("/generate", content=body, headers=headers)
        assert answer.status_code == 200
