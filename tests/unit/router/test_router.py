"""The router on nodes of a few lines: who is asked, what is retried, what the client sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import Scope

from hicache_core.kv_transfer.secret import room_proof
from hicache_core.router.affinity import BLOCK_CHARS, Affinity
from hicache_core.router.app import MAX_BODY_NBYTES, StreamedAnswer, make_app
from hicache_core.router.forwarder import Answer
from hicache_core.router.nodes import DECODE, LATE_S, Nodes, RouterSettings

P1, P2, D1, D2 = "http://p1", "http://p2", "http://d1", "http://d2"
PROMPT = "once upon a time " * 40


@dataclass
class Cluster(httpx.AsyncBaseTransport):
    """Nodes that answer at once.

    Attributes:
        dead: those that are not there.
        broken: those that answer 503, or ``status``.
        frozen: those that take a request and say nothing any more.
    """

    dead: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    status: int = 503
    frozen: set[str] = field(default_factory=set)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    breaks_off: bool = False
    freezes: bool = False
    refuses_rooms: bool = False

    def of(self, host: str) -> list[dict[str, Any]]:
        """The bodies that a node got."""
        return [body for url, body in self.asked if url == f"http://{host}"]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = f"http://{request.url.host}"
        if url in self.dead:
            raise httpx.ConnectError("refused", request=request)
        if url in self.frozen:
            await asyncio.Event().wait()
        if request.method == "GET":
            self.keys.append(request.headers.get("authorization"))
            return httpx.Response(200, json=self._look(request.url.host, request.url.path))
        body = json.loads(await request.aread())
        self.asked.append((url, body))
        return await self._generate(url, body, request)

    async def _generate(
        self, url: str, body: dict[str, Any], request: httpx.Request
    ) -> httpx.Response:
        if url in self.broken:
            return httpx.Response(self.status, json={"error": {"message": "full"}})
        if self.refuses_rooms and "bootstrap_room" in body:
            told = {"message": "start with the same --disaggregation-secret"}
            return httpx.Response(403, json={"error": {**told, "param": "bootstrap_room"}})
        if body.get("prompt") == "":
            return httpx.Response(400, json={"error": {"message": "empty"}})
        if request.url.host.startswith("p"):
            return httpx.Response(200, json={})
        if f"http://{body.get('bootstrap_host')}" in self.frozen:
            await asyncio.Event().wait()  # for its rows
        await asyncio.sleep(0.01)  # a prefill node is first with its answer
        if body.get("stream"):
            return httpx.Response(200, stream=_Pieces(self, request))
        return httpx.Response(200, json={"from": url, "auth": request.headers.get("authorization")})

    def _look(self, host: str, path: str) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        return {"disaggregation_transfer_address": "0.0.0.0:7" + host[1]} if host[0] == "p" else {}


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, cluster: Cluster, request: httpx.Request) -> None:
        self._cluster, self._request = cluster, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        if self._cluster.freezes:
            self._cluster.frozen.add(D1)
            await asyncio.Event().wait()
        if self._cluster.breaks_off:
            raise httpx.ReadError("reset", request=self._request)
        yield b"data: [DONE]\n\n"


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def router(cluster: Cluster) -> Iterator[TestClient]:
    with routed(cluster, [P1, P2], [D1], api_key="probe") as client:
        yield client


def everybody(_scope: Scope) -> bool:
    return True


@contextmanager
def routed(
    cluster: Cluster, prefill: list[str], decode: list[str], **settings: Any
) -> Iterator[TestClient]:
    """A router before nodes, asked by the operator."""
    told = RouterSettings(prefill, decode, **{"interval_s": 60.0, **settings})
    with TestClient(make_app(told, transport=cluster, is_operator=everybody)) as client:
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
    assert "decode node 1: ConnectError" in answer.json()["error"]["message"]
    assert router.get("/health").status_code == 503


def test_another_decode_node_is_tried_too(cluster: Cluster) -> None:
    with routed(cluster, [P1], [D1, D2]) as client:
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


FOREIGN = {
    "bootstrap_host": "203.0.113.9",
    "bootstrap_port": 9,
    "bootstrap_room": 9,
    "bootstrap_proof": "9" * 64,
    "Bootstrap_Host": ["203.0.113.9"],
    "bootstrap_anything": {"a": 9},
}


@pytest.mark.parametrize(
    "prompt",
    [{"prompt": PROMPT}, {"input_ids": [[1, 2, 3]]}, {"text": [PROMPT]}, {"text": "a", "n": 2}],
)
def test_what_a_client_says_of_rooms_reaches_no_node(
    cluster: Cluster, prompt: dict[str, Any]
) -> None:
    for parameters in (FOREIGN, [FOREIGN | {"top_k": 3}]):
        with routed(cluster, [P1], [D1]) as router:
            router.post("/generate", json={**prompt, **FOREIGN, "sampling_params": parameters})
    assert cluster.of("d1")
    for _, body in cluster.asked:
        assert body.get("bootstrap_host", "p1") == "p1"
        assert body.get("bootstrap_port", 71) == 71
        text = json.dumps(body)
        assert all(word not in text for word in ("203.0.113.9", "proof", "Boot", "anything"))


def test_a_router_with_a_secret_shows_that_a_room_is_its_own(cluster: Cluster) -> None:
    with routed(cluster, [P1], [D1], secret="s" * 32) as router:
        complete(router)
    for name in ("p1", "d1"):
        (body,) = cluster.of(name)
        room = body["bootstrap_room"]
        assert body["bootstrap_proof"] == room_proof("s" * 32, "p1", 71, room)


def test_nodes_that_do_not_take_the_routers_rooms_are_an_error_that_says_so(
    cluster: Cluster,
) -> None:
    cluster.refuses_rooms = True
    with routed(cluster, [P1], [D1]) as router:
        answer = complete(router)
    assert answer.status_code == 503
    assert "same --disaggregation-secret" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("status", "n_asked"), [(503, 4), (500, 2), (502, 2)])
def test_a_request_that_nodes_failed_at_is_tried_once_more_only(
    cluster: Cluster, status: int, n_asked: int
) -> None:
    """It may be what they failed of. Those that have no time for it have not tried it."""
    decodes = [f"http://d{n}" for n in range(1, 6)]
    cluster.broken, cluster.status = set(decodes), status
    with routed(cluster, [P1], decodes) as router:
        answer = complete(router)
    assert answer.status_code == (500 if status == 500 else 503)
    assert sum(len(cluster.of(f"d{n}")) for n in range(1, 6)) == n_asked


@pytest.mark.parametrize("half", [P1, D1])
def test_a_request_at_a_node_that_is_silent_goes_to_another_one(
    cluster: Cluster, half: str
) -> None:
    with routed(cluster, [P1, P2], [D1, D2], interval_s=0.01, silent_s=0.05) as router:
        cluster.frozen.add(half)
        assert complete(router).json()["from"] == (D2 if half == D1 else D1)
        assert status(router)[half]["error"] == "it does not answer within 0.05 s"


def test_a_stream_of_a_node_that_is_silent_ends_with_an_error(cluster: Cluster) -> None:
    cluster.freezes = True
    with routed(cluster, [P1], [D1, D2], interval_s=0.01, silent_s=0.05) as router:
        text = complete(router, stream=True).text
    assert text.startswith("data: 1\n\ndata: {")
    assert "decode node 1: it does not answer any more" in text


def test_a_node_that_is_late_with_its_health_gets_nothing_that_another_can_have() -> None:
    """One that is late is not down: what it computes goes on, and it serves if all are late."""
    cluster, now = Cluster(), [0.0]

    async def play() -> list[str]:
        async with httpx.AsyncClient(transport=cluster) as client:
            settings = RouterSettings([], [D1, D2], silent_s=60.0)
            nodes = Nodes(client, settings, lambda: now[0])
            await nodes.check_all()
            picked = []
            for frozen in ([], [D1], [D1, D2]):
                cluster.frozen = set(frozen)
                checking = asyncio.create_task(nodes.check_all())
                await asyncio.sleep(0.02)
                now[0] += 2 * LATE_S
                picked.append(node.url if (node := nodes.pick(DECODE, "", "")) else "none")
                checking.cancel()
                await asyncio.wait([checking])
            return picked

    assert asyncio.run(play()) == [D1, D2, D1]


def test_nobody_but_the_operator_is_told_where_the_nodes_are(cluster: Cluster) -> None:
    with TestClient(make_app(RouterSettings([P1], [D1]), transport=cluster)) as router:
        seen = [complete(router), router.get("/router/status")]
        cluster.dead.add(D1)
        seen.append(complete(router))
        assert [answer.status_code for answer in seen] == [200, 403, 503]
        seen[0].json().pop("from")  # which the node of this test says itself
        assert "x-hicache-decode" not in seen[0].headers
        assert all("http://" not in answer.text for answer in seen[1:])
        assert "decode node 1" in seen[2].text


def test_the_operator_is_told_who_took_part(router: TestClient) -> None:
    headers = complete(router).headers
    assert (headers["x-hicache-prefill"], headers["x-hicache-decode"]) == (P1, D1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[1]",
        b"{",
        b"\xff",
        b'{"text": "\xff"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        '{"prompt": "a"}'.encode("utf-16"),
    ],
    ids=range(11),
)
def test_what_is_no_json_object_is_refused_in_json(
    router: TestClient, cluster: Cluster, raw: bytes
) -> None:
    answer = router.post("/generate", content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not cluster.asked


@pytest.mark.parametrize("text", ["\ud800", [[[[[[[[[]]]]]]]]], {"a": None}])
def test_what_is_json_goes_on_as_it_came(router: TestClient, cluster: Cluster, text: Any) -> None:
    """Half a character too: the node refuses it, as it does without a router."""
    router.post("/generate", content=json.dumps({"text": text}))
    assert cluster.of("d1")
    assert all(body["text"] == text for _, body in cluster.asked)


@pytest.mark.parametrize("announced", [False, True])
def test_a_body_that_is_too_large_is_not_read_to_its_end(cluster: Cluster, announced: bool) -> None:
    app = make_app(RouterSettings([], [D1]), transport=cluster)
    said: list[dict[str, Any]] = []
    n_read = 0

    async def receive() -> dict[str, Any]:
        nonlocal n_read
        n_read += 1
        return {"type": "http.request", "body": b" " * (1 << 20), "more_body": True}

    async def send(message: Any) -> None:
        said.append(message)

    length = [(b"content-length", str(600 << 20).encode())] if announced else []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "query_string": b"",
        "headers": length,
    }
    asyncio.run(app(scope, receive, send))
    assert said[0]["status"] == 413
    assert n_read == (0 if announced else MAX_BODY_NBYTES // (1 << 20) + 1)


def test_what_a_request_held_is_released_though_its_client_never_took_a_piece() -> None:
    released = []

    async def play() -> None:
        answer = Answer(200, {}, b"data: 1\n\n", _nothing())
        answer.stack.callback(released.append, True)

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(_message: Any) -> None:
            await asyncio.Event().wait()

        await StreamedAnswer(answer)({"type": "http"}, receive, send)

    asyncio.run(play())
    assert released == [True]


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield


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
    with routed(cluster, [P1], [D1], interval_s=0.01) as client:
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
