"""The router on nodes of a few lines: who is asked, what is retried, what the client sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from hicache_core.disaggregation.affinity import BLOCK_CHARS, Affinity
from hicache_core.disaggregation.router import make_app

P1, P2, D1, D2 = "http://p1", "http://p2", "http://d1", "http://d2"
PROMPT = "once upon a time " * 40


@dataclass
class Cluster(httpx.AsyncBaseTransport):
    """Nodes that answer at once; those in ``dead`` are not there."""

    dead: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    breaks_off: bool = False

    def of(self, host: str) -> list[dict[str, Any]]:
        """The bodies that a node got."""
        return [body for url, body in self.asked if url == f"http://{host}"]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = f"http://{request.url.host}"
        if url in self.dead:
            raise httpx.ConnectError("refused", request=request)
        if request.method == "GET":
            self.keys.append(request.headers.get("authorization"))
            return httpx.Response(200, json=self._look(request.url.host, request.url.path))
        body = json.loads(await request.aread())
        self.asked.append((url, body))
        if url in self.broken:
            return httpx.Response(503, json={"error": {"message": "full"}})
        if body.get("prompt") == "":
            return httpx.Response(400, json={"error": {"message": "empty"}})
        if request.url.host.startswith("p"):
            return httpx.Response(200, json={})
        await asyncio.sleep(0.01)  # a prefill node is first with its answer
        if body.get("stream"):
            return httpx.Response(200, stream=_Pieces(request, self.breaks_off))
        return httpx.Response(200, json={"from": url, "auth": request.headers.get("authorization")})

    def _look(self, host: str, path: str) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        return {"disaggregation_transfer_address": "0.0.0.0:7" + host[1]} if host[0] == "p" else {}


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, request: httpx.Request, breaks_off: bool) -> None:
        self._request, self._breaks_off = request, breaks_off

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        if self._breaks_off:
            raise httpx.ReadError("reset", request=self._request)
        yield b"data: [DONE]\n\n"


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def router(cluster: Cluster) -> Iterator[TestClient]:
    app = make_app([P1, P2], [D1], transport=cluster, interval_s=60.0, api_key="probe")
    with TestClient(app) as client:
        yield client


def complete(router: TestClient, prompt: str = PROMPT, **more: Any) -> httpx.Response:
    return router.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, **more})


def status(router: TestClient) -> dict[str, Any]:
    return {node["url"]: node for node in router.get("/router/status").json()["nodes"]}


def test_both_halves_get_the_same_room_and_the_prefill_nodes_address(
    router: TestClient, cluster: Cluster
) -> None:
    assert complete(router).json()["from"] == D1
    (prefill,) = cluster.of("p1")
    (decode,) = cluster.of("d1")
    for half in (prefill, decode):
        assert half["prompt"] == PROMPT
        assert (half["bootstrap_host"], half["bootstrap_port"]) == ("p1", 71)
    assert prefill["bootstrap_room"] == decode["bootstrap_room"] < 2**63
    assert prefill["stream"] is False


def test_a_prompt_goes_where_its_beginning_was_and_others_to_the_idlest(
    router: TestClient, cluster: Cluster
) -> None:
    complete(router)
    complete(router, "something else " * 40)
    assert [len(cluster.of(name)) for name in ("p1", "p2")] == [1, 1]
    complete(router, PROMPT + "and so on")
    assert [len(cluster.of(name)) for name in ("p1", "p2")] == [2, 1]


def test_a_tenant_does_not_follow_another(router: TestClient, cluster: Cluster) -> None:
    complete(router)
    complete(router, cache_salt="b")
    assert [len(cluster.of(name)) for name in ("p1", "p2")] == [1, 1]


@pytest.mark.parametrize("kind", ["dead", "broken"])
def test_another_prefill_node_is_tried_while_nothing_was_sent(
    router: TestClient, cluster: Cluster, kind: str
) -> None:
    getattr(cluster, kind).add(P1)
    assert complete(router).json()["from"] == D1
    assert len(cluster.of("p2")) == 1
    rooms = [body["bootstrap_room"] for body in cluster.of("d1")]
    assert len(set(rooms)) == len(rooms) == 2
    assert cluster.of("p2")[0]["bootstrap_room"] == rooms[-1]
    assert status(router)[P1]["is_up"] is (kind == "broken")


def test_without_a_prefill_node_the_decode_node_computes(
    router: TestClient, cluster: Cluster
) -> None:
    cluster.dead |= {P1, P2}
    assert complete(router).json()["from"] == D1
    assert "bootstrap_room" not in cluster.of("d1")[-1]
    assert router.get("/router/status").json()["without_prefill"] == 1


def test_without_a_decode_node_there_is_an_error(router: TestClient, cluster: Cluster) -> None:
    cluster.dead.add(D1)
    answer = complete(router)
    assert answer.status_code == 503
    assert "decode node http://d1: ConnectError" in answer.json()["error"]["message"]
    assert router.get("/health").status_code == 503


def test_another_decode_node_is_tried_too(cluster: Cluster) -> None:
    app = make_app([P1], [D1, D2], transport=cluster, interval_s=60.0)
    with TestClient(app) as client:
        cluster.dead.add(D1)
        assert complete(client).json()["from"] == D2


def test_a_request_that_is_wrong_is_refused_with_the_nodes_words(router: TestClient) -> None:
    answer = complete(router, "")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "empty")
    assert router.post("/v1/completions", content=b"[1]").status_code == 400


def test_several_answers_at_once_are_computed_where_they_are_decoded(
    router: TestClient, cluster: Cluster
) -> None:
    complete(router, n=2)
    router.post("/generate", json={"text": ["a", "b"]})
    router.post("/generate", json={"input_ids": [1, 2, 3], "sampling_params": {"n": 1}})
    assert ["bootstrap_room" in body for body in cluster.of("d1")] == [False, False, True]


def test_a_stream_goes_through_as_it_is(router: TestClient) -> None:
    assert complete(router, stream=True).text == "data: 1\n\ndata: [DONE]\n\n"
    assert status(router)[D1]["tokens"] == 0


def test_a_stream_that_breaks_off_says_so(router: TestClient, cluster: Cluster) -> None:
    cluster.breaks_off = True
    text = complete(router, stream=True).text
    assert text.startswith("data: 1\n\ndata: {")
    assert "the answer broke off" in text
    assert len(cluster.of("d1")) == 1


def test_the_routers_key_is_for_its_own_looks(router: TestClient, cluster: Cluster) -> None:
    assert set(cluster.keys) == {"Bearer probe"}
    assert complete(router).json()["auth"] is None
    answer = router.post(
        "/v1/completions", json={"prompt": "x"}, headers={"Authorization": "Bearer mine"}
    )
    assert answer.json()["auth"] == "Bearer mine"


def test_a_node_that_comes_back_is_used_again(cluster: Cluster) -> None:
    cluster.dead.add(P1)
    app = make_app([P1], [D1], transport=cluster, interval_s=0.01)
    with TestClient(app) as client:
        assert not status(client)[P1]["is_up"]
        cluster.dead.clear()
        while not status(client)[P1]["is_up"]:
            pass
        complete(client)
    assert len(cluster.of("p1")) == 1


def test_models_are_those_of_a_decode_node(router: TestClient) -> None:
    assert router.get("/v1/models").json() == {"data": [{"id": "tiny"}]}


def test_affinity_forgets_the_oldest() -> None:
    affinity = Affinity(max_entries=4)
    affinity.remember("a" * BLOCK_CHARS * 2, "", "p1")
    affinity.remember("b" * BLOCK_CHARS * 3, "", "p2")
    assert affinity.lookup("a" * BLOCK_CHARS * 2, "") is None
    assert affinity.lookup("b" * BLOCK_CHARS * 6, "") == "p2"
    assert affinity.lookup("b" * BLOCK_CHARS, "t") is None


def test_a_beginning_that_all_share_draws_nobody_to_one_node() -> None:
    affinity = Affinity()
    affinity.remember("s" * BLOCK_CHARS + "a" * BLOCK_CHARS * 2, "", "p1")
    assert affinity.lookup("s" * BLOCK_CHARS + "b" * BLOCK_CHARS * 2, "") is None
