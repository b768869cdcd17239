"""Forwarder: one request at a prefill and a decode node at once, and its answer to the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from hicache_core.kv_transfer.secret import room_proof
from hicache_core.router.client_request import ClientRequest, encoded
from hicache_core.router.nodes import DECODE, PREFILL, Node, Nodes

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
MAX_STRICKEN = 2
"""After so many nodes failed at a request it is not given to another, since it may be the cause."""
GRACE_S = 0.5
"""A prefill node says so long after the rows were fetched that they were."""
_KEPT = ("content-type", "retry-after", "x-request-id", "cache-control")


@dataclass(slots=True)
class Answer:
    """The answer to the client.

    Attributes:
        status: of HTTP.
        headers: for the client.
        first: the whole body, or its first piece.
        rest: the further pieces; None if there are none.
        stack: releases the node when the answer has ended.
        served_by: headers that say which nodes took part, for the operator.
    """

    status: int
    headers: dict[str, str]
    first: bytes
    rest: AsyncIterator[bytes] | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    served_by: dict[str, str] = field(default_factory=dict)

    @classmethod
    def problem(cls, status: int, message: str) -> Answer:
        """An error of the router itself, in OpenAI's shape."""
        return cls(
            status,
            {"content-type": "application/json"},
            json.dumps(_error(message, status)).encode(),
        )


class _NodeFailed(Exception):
    """A node did not answer, or with an error of its own; another one may do better.

    Attributes:
        node: which one.
        status: of its answer; 503 if there was none.
        struck: the node had the request and failed at it, so that the request may be the cause.
    """

    def __init__(self, node: Node, error: str, status: int = 503, *, struck: bool) -> None:
        super().__init__(f"{node.name}: {error}")
        self.node = node
        self.status = status
        self.struck = struck


class Forwarder:
    """Sends requests to pairs of nodes. Belongs to one event loop."""

    def __init__(self, client: httpx.AsyncClient, nodes: Nodes, secret: str | None = None) -> None:
        """Sends nothing yet.

        Args:
            client: without a time limit on answers, since a model may take long.
            nodes: the nodes to choose from.
            secret: shared with the nodes, to prove that rooms are this router's; None for none.
        """
        self._client = client
        self._nodes = nodes
        self._secret = secret
        self.retried = 0
        self.without_prefill = 0

    async def ask(self, asked: ClientRequest) -> Answer:
        """The answer, complete or with its first piece. Until then it tries other nodes on failure.

        The caller closes the answer's ``stack`` when all is sent, or when the client has left.
        """
        tried: set[str] = set()
        status, last, n_stricken = 503, "no decode node is up", 0
        for _ in range(MAX_ATTEMPTS):
            decode = self._nodes.pick(DECODE, asked.prompt, asked.tenant, tried)
            if decode is None or n_stricken == MAX_STRICKEN:
                break
            prefill = None
            if asked.is_single:
                prefill = self._nodes.pick(PREFILL, asked.prompt, asked.tenant, tried)
            if prefill is None:
                self.without_prefill += 1
            try:
                return await self._attempt(asked, prefill, decode)
            except _NodeFailed as failure:
                status, last = failure.status, str(failure)
                n_stricken += failure.struck
                log.warning("request goes to another node: %s (%s)", failure, failure.node.url)
                self.retried += 1
                tried.add(failure.node.url)
        return Answer.problem(
            500 if status == 500 else 503,
            f"no node could serve the request; the last error: {last}",
        )

    async def _attempt(self, asked: ClientRequest, prefill: Node | None, decode: Node) -> Answer:
        async with AsyncExitStack() as stack:
            computing: asyncio.Task[Answer | None] | None = None
            room: dict[str, Any] = {}
            place = None if prefill is None else prefill.bootstrap_for(decode)
            if prefill is not None and place is not None:
                room = self._room_at(*place)
                computing = asyncio.create_task(self._compute(asked, prefill, room))
                stack.push_async_exit(partial(_end_soon, computing))
            decoding = asyncio.create_task(self._decode(asked, decode, room, stack))
            try:
                if computing is not None:
                    await asyncio.wait([computing, decoding], return_when=asyncio.FIRST_COMPLETED)
                    if not decoding.done() and (refusal := await computing) is not None:
                        return refusal
                answer = await decoding
            finally:
                await _end(decoding)  # before the stack closes what it reads from
            answer.stack = stack.pop_all()
            answer.served_by["x-hicache-decode"] = decode.url
            if prefill is not None:
                answer.served_by["x-hicache-prefill"] = prefill.url
            return answer

    def _room_at(self, host: str, port: int) -> dict[str, Any]:
        """The fields of a new room."""
        number = secrets.randbits(63)
        room = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": number}
        if self._secret is not None:
            room["bootstrap_proof"] = room_proof(self._secret, host, port, number)
        return room

    async def _compute(
        self, asked: ClientRequest, node: Node, room: Mapping[str, Any]
    ) -> Answer | None:
        """The prefill half: None if it went well, or what the node has against the request."""
        body = {**asked.body, **room, "stream": False}
        body.pop("stream_options", None)
        with node.carrying(asked.n_tokens):
            try:
                async with node.awaited():
                    response = await self._client.send(self._request(asked, node, body))
            except (httpx.HTTPError, TimeoutError) as error:
                raise self._failed(node, error) from error
        _check(node, response)
        if response.status_code >= 400:
            return Answer(response.status_code, _kept(response), response.content)
        node.served += 1
        return None

    async def _decode(
        self, asked: ClientRequest, node: Node, room: Mapping[str, Any], stack: AsyncExitStack
    ) -> Answer:
        """The decode half, until the whole answer or its first piece is there."""
        stack.enter_context(node.carrying(asked.n_tokens + asked.n_new_tokens))
        request = self._request(asked, node, {**asked.body, **room})
        try:
            async with node.awaited():
                response = await self._client.send(request, stream=True)
                stack.push_async_callback(response.aclose)
                if not asked.is_stream or response.status_code >= 400:
                    whole = await response.aread()
                    _check(node, response)
                    node.served += 1
                    return Answer(response.status_code, _kept(response), whole)
                pieces = response.aiter_raw()
                first = await anext(pieces, b"")
        except (httpx.HTTPError, TimeoutError) as error:
            raise self._failed(node, error) from error
        return Answer(200, _kept(response), first, self._rest(pieces, node))

    async def _rest(self, pieces: AsyncIterator[bytes], node: Node) -> AsyncIterator[bytes]:
        """The pieces as they come; one that says so if the node is lost."""
        try:
            while True:
                async with node.awaited():
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                yield piece
            node.served += 1
        except (httpx.HTTPError, TimeoutError) as error:
            failure = self._failed(node, error)
            log.warning("an answer broke off: %s (%s)", failure, node.url)
            text = json.dumps(_error(f"the answer broke off: {failure}", 502))
            yield f"data: {text}\n\n".encode()

    def _request(self, asked: ClientRequest, node: Node, body: Mapping[str, Any]) -> httpx.Request:
        headers = {**asked.headers, "content-type": "application/json"}
        return self._client.build_request(
            "POST", node.url + asked.path, content=encoded(body), headers=headers
        )

    def _failed(self, node: Node, error: Exception) -> _NodeFailed:
        if isinstance(error, TimeoutError):
            return _NodeFailed(node, "it does not answer any more", struck=True)
        text = f"{type(error).__name__} {error}".strip()
        self._nodes.failed(node, text)
        never_got_it = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        return _NodeFailed(node, text, struck=not never_got_it)


def _check(node: Node, response: httpx.Response) -> None:
    """Raises _NodeFailed for an answer that says more of the node than of the request."""
    status = response.status_code
    if status == 403 and "bootstrap_" in response.text:  # it does not take this router's rooms
        raise _NodeFailed(node, response.text[:300], struck=False)
    if status >= 500:
        text = f"status {status}: {response.text[:200]}"
        raise _NodeFailed(node, text, status, struck=status != 503)


async def _end_soon(
    computing: asyncio.Task[Answer | None], kind: type[BaseException] | None, *_: object
) -> None:
    """Ends the prefill half. If all went well it ends by itself, a moment after the decode half."""
    if kind is None:
        await asyncio.wait([computing], timeout=GRACE_S)
    await _end(computing)


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancels a task that has not ended; what it raised was for somebody else."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, _NodeFailed):
        await task


def _kept(response: httpx.Response) -> dict[str, str]:
    return {name: response.headers[name] for name in _KEPT if name in response.headers}


def _error(message: str, status: int) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
