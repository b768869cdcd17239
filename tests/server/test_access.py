"""Who may call what: keys, the operator on this machine, and tenants among themselves."""

from __future__ import annotations

import logging
from itertools import product
from typing import Any

import httpx
import pytest

from hicache_core.kv.keys import chain_seed, pack_tokens, page_digests
from hicache_core.observe.event_format import block_hashes
from hicache_core.server.access import Keys
from hicache_core.types import Namespace
from tests.server.world import LOCAL, PAGE, REMOTE, Server, server
from tests.unit.observe.subscriber import Subscriber

pytestmark = pytest.mark.anyio

IDS = list(range(3, 15))
ADMIN_CALLS = [
    ("GET", "/flush_cache"),
    ("POST", "/flush_cache"),
    ("POST", "/reset_prefix_cache"),
    ("GET", "/hicache/storage-backend"),
    ("PUT", "/hicache/storage-backend"),
    ("DELETE", "/hicache/storage-backend"),
    ("POST", "/hicache/storage-backend/clear"),
    ("POST", "/hicache/warm"),
]
CALLS = [
    ("POST", "/generate"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/get_server_info"),
    ("GET", "/get_model_info"),
    ("GET", "/health_generate"),
    ("GET", "/metrics"),
    ("GET", "/hicache/status"),
    ("GET", "/hicache/explain/x"),
]
BOTH = Keys("the-api-key", "the-admin-key")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_with_an_api_key_nothing_but_health_answers_without_one() -> None:
    wrong = ({}, bearer("wrong"), bearer("ключ"), {"authorization": "Basic x"})
    async with server(keys=BOTH) as s:
        for (method, path), headers in product(CALLS + ADMIN_CALLS, wrong):
            raw = {name: value.encode() for name, value in headers.items()}
            refused = await s.client.request(method, path, headers=raw)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["type"] == "authentication_error"
        assert (await s.client.get("/health")).status_code == 200


async def test_the_operators_calls_need_the_admin_key_where_there_is_one() -> None:
    async with server(keys=BOTH) as s:
        for method, path in ADMIN_CALLS:
            refused = await s.client.request(method, path, headers=bearer(BOTH.api or ""))
            assert refused.status_code == 403
            allowed = await s.client.request(method, path, headers=bearer(BOTH.admin or ""))
            assert allowed.status_code in (200, 400)


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        (REMOTE, {}),
        (LOCAL, {"x-forwarded-for": "192.0.2.7"}),
        (LOCAL, {"origin": "https://example.org"}),
        (LOCAL, {"sec-fetch-site": "cross-site"}),
        (LOCAL, {"host": "example.org"}),
    ],
)
async def test_without_an_admin_key_the_operator_is_on_this_machine(
    address: tuple[str, int], headers: dict[str, str]
) -> None:
    async with server() as s, s.calling_from(address, **headers) as stranger:
        for method, path in ADMIN_CALLS:
            assert (await stranger.request(method, path)).status_code == 403
            assert (await s.client.request(method, path)).status_code in (200, 400)


PAGES = [
    {"origin": "https://example.org"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
    {"host": "example.org"},
]


@pytest.mark.parametrize("headers", PAGES)
async def test_without_keys_a_page_of_another_site_reads_and_sends_nothing(
    headers: dict[str, str],
) -> None:
    async with server() as s, s.calling_from(LOCAL, **headers) as page:
        for method, path in CALLS:
            raw = {"content-type": "text/plain"}
            refused = await page.request(method, path, headers=raw, content=b'{"input_ids": [3]}')
            assert refused.status_code == 403
            assert "--api-key" in refused.json()["error"]["message"]
        assert s.engine.received == []
    async with server(keys=Keys(api="the-api-key")) as s, s.calling_from(LOCAL, **headers) as page:
        assert (await page.get("/v1/models", headers=bearer("the-api-key"))).status_code == 200
    async with server(host="0.0.0.0") as s, s.calling_from(LOCAL, **headers) as page:
        assert (await page.get("/v1/models")).status_code == 200


async def test_without_a_key_the_page_has_its_own_files_and_nothing_else_that_reads_alike() -> None:
    async with server(keys=BOTH) as s:
        body = {"input_ids": IDS, "rid": "abc.js", "sampling_params": {"max_new_tokens": 1}}
        await s.client.post("/generate", json=body, headers=bearer(BOTH.api or ""))
        for path in ("/hicache/", "/hicache/app.js", "/hicache/page.css", "/hicache/icon.svg"):
            assert (await s.client.get(path)).status_code == 200
        for path in ("/hicache/explain/abc.js", "/hicache/status.js", "/hicache/tree/x.css"):
            assert (await s.client.get(path)).status_code == 401


async def test_a_priority_beyond_what_clients_may_ask_for_needs_the_admin_key() -> None:
    """Without a bound, whoever asks for more is served before all others, for ever."""
    body = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 1}}
    async with server(keys=BOTH, max_client_priority=5) as s:
        for path in ("/generate", "/v1/completions"):
            own = {"prompt": IDS, "max_tokens": 1} if path == "/v1/completions" else body
            for key, priority, status in [
                (BOTH.api, -9, 200),
                (BOTH.api, 5, 200),
                (BOTH.api, 6, 400),
                (BOTH.admin, 6, 200),
            ]:
                asked = {**own, "priority": priority}
                answer = await s.client.post(path, json=asked, headers=bearer(key or ""))
                assert answer.status_code == status
                if status == 400:
                    assert answer.json()["error"]["param"] == "priority"
    async with server() as s:  # the operator by place, not by key, is a client like all others
        assert (await s.client.post("/generate", json={**body, "priority": 1})).status_code == 400


async def test_health_answers_head() -> None:
    async with server(keys=BOTH) as s:
        assert (await s.client.head("/health")).status_code == 200


async def test_keys_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with server(keys=BOTH, enable_metrics=True) as s:
        texts = [repr(BOTH)]
        for path in ("/get_server_info", "/hicache/status", "/metrics", "/hicache/storage-backend"):
            for key in ("wrong", BOTH.api, BOTH.admin):
                texts.append((await s.client.get(path, headers=bearer(key or ""))).text)
    for key in (BOTH.api, BOTH.admin):
        assert key is not None
        assert key not in caplog.text
        assert not any(key in text for text in texts)


async def test_metrics_are_there_only_if_asked_for() -> None:
    async with server() as s:
        assert (await s.client.get("/metrics")).status_code == 404
    async with server(enable_metrics=True) as s:
        await s.client.post("/generate", json={"input_ids": IDS, "sampling_params": {}})
        text = (await s.client.get("/metrics")).text
    assert 'hicache:num_requests_total{finish_reason="length",model_name="echo"} 1.0' in text
    assert 'hicache:num_requests_total{finish_reason="error",model_name="echo"} 0.0' in text
    own = [line for line in text.splitlines() if line.startswith("hicache:")]
    assert [line for line in own if 'model_name="echo"' not in line] == []
    plain = text.replace('{model_name="echo"}', "")
    assert "hicache:generation_tokens_total 128.0" in plain
    assert "hicache:missed_tokens_total 12.0" in plain
    assert "hicache:time_to_first_token_seconds_count 1.0" in plain


class Tenant:
    """One who knows his salt and nothing else of the others."""

    def __init__(self, client: httpx.AsyncClient, field: str, value: str) -> None:
        self._client = client
        self._namespace = {field: value}
        header = "x-hicache-salt" if field == "cache_salt" else "x-hicache-extra-key"
        self._headers = {header: value}

    async def ask(self, path: str, ids: list[int], rid: str) -> int:
        """Tokens that the server says were cached for this prompt."""
        body: dict[str, Any] = {**self._namespace, "rid": rid}
        if path == "/generate":
            body |= {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
            answer = (await self._client.post(path, json=body)).json()
            return int(answer["meta_info"]["cached_tokens"])
        body |= {"prompt": ids, "max_tokens": 1}
        answer = (await self._client.post(path, json=body)).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def explanation(self, rid: str) -> httpx.Response:
        return await self._client.get(f"/hicache/explain/{rid}", headers=self._headers)


async def facts(s: Server, client: httpx.AsyncClient) -> str:
    """Everything that a tenant can read of the server beside his own requests."""
    paths = ("/hicache/status", "/metrics", "/get_server_info")
    return "".join([(await client.get(path)).text for path in paths])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
async def test_no_answer_shows_a_tenant_what_another_has(path: str, field: str) -> None:
    """Cached tokens, explanations, status and metrics are as if the other were not there."""
    async with (
        server(enable_metrics=True, enable_cache_report=True) as s,
        s.calling_from(REMOTE) as client,
    ):
        a, b = Tenant(client, field, "a"), Tenant(client, field, "b")
        stranger_ids = [token + 1 for token in IDS]
        assert await a.ask(path, IDS, "first") == 0
        assert await a.ask(path, IDS, "first") == 12
        seen = await b.ask(path, IDS, "second")
        unseen = await b.ask(path, stranger_ids, "third")
        assert seen == unseen == 0
        second, third = [(await b.explanation(rid)).json() for rid in ("second", "third")]
        for record in (second, third):
            del record["request_id"], record["at_s"]
        assert second == third
        assert second["reason"] == "never_seen"
        assert (await a.explanation("second")).status_code == 404
        assert (await b.explanation("first")).status_code == 404
        assert (await b.explanation("nobody")).status_code == 404
        assert "other_namespace" not in await facts(s, client)
        # The operator is told.
        shown = (await s.client.get("/hicache/explain/second")).json()
        assert shown["reason"] == "other_namespace"
        assert "other_namespace" in await facts(s, s.client)


async def test_tenants_may_use_the_same_names() -> None:
    async with server() as s, s.calling_from(REMOTE) as client:
        a, b = Tenant(client, "cache_salt", "a"), Tenant(client, "cache_salt", "b")
        await a.ask("/generate", IDS, "same")
        await b.ask("/generate", IDS[:8], "same")
        assert (await a.explanation("same")).json()["n_tokens"] == 12
        assert (await b.explanation("same")).json()["n_tokens"] == 8


async def test_salt_and_extra_key_are_not_one_another() -> None:
    """Neither is a prefix that reads alike: all of these are separate caches."""
    async with server() as s:
        tenants = [
            {},
            {"cache_salt": "x"},
            {"extra_key": "x"},
            {"cache_salt": "x", "extra_key": "x"},
        ]
        for tenant in tenants:
            for expected in (0, 12):
                body = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 1}, **tenant}
                answer = (await s.client.post("/generate", json=body)).json()
                assert answer["meta_info"]["cached_tokens"] == expected


async def test_events_of_equal_prompts_have_nothing_in_common() -> None:
    """A router sees two tenants' pages under other hashes, and as the starts of two prompts."""
    config = {"kv_events_config": {"endpoint": "tcp://127.0.0.1:*"}}
    async with server(cache=config) as s:
        publisher = s.engine.cache._observers._events
        assert publisher is not None
        subscriber = Subscriber(publisher)
        try:
            subscriber.join(publisher)
            a, b = (hashes_of(IDS, Namespace(cache_salt=salt)) for salt in ("a", "b"))
            for salt in ("a", "b"):
                body = {"input_ids": IDS, "cache_salt": salt, "sampling_params": {}}
                await s.client.post("/generate", json=body)
            subscriber.next_seq = subscriber.receive()[0] + 1
            subscriber.follow_until(b[-1])
        finally:
            subscriber.close()
    assert set(a).isdisjoint(b)
    assert set(b) <= subscriber.index["GPU"] <= {*a, *b}


def hashes_of(ids: list[int], namespace: Namespace) -> list[int]:
    return block_hashes(page_digests(pack_tokens(ids), PAGE, chain_seed(namespace)))
