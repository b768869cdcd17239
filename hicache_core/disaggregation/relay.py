"""Relay: one request at a prefill and a decode node at once, and its answer to the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx

from hicache_core.disaggregation.affinity import prompt_of
from hicache_core.disaggregation.nodes import DECODE, PREFILL, Node, Nodes

log = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4
MAX_ATTEMPTS = 4
_PASSED_ON = ("authorization", "x-request-id")
_KEPT = ("content-type", "retry-after", "x-request-id", "cache-control")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the client sent it.

    Attributes:
        path: at the node too.
        body: the JSON object.
        headers: those that the nodes get.
    """

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]

    @classmethod
    def of(cls, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
        """With the headers that are passed on."""
        return cls(path, body, {k: v for k, v in headers.items() if k.lower() in _PASSED_ON})

    @property
    def is_stream(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.body.get("stream"))

    @property
    def prompt(self) -> str:
        """What affinity goes by."""
        return prompt_of(self.body)

    @property
    def tenant(self) -> str:
        """Who shares prefixes with whom."""
        return json.dumps([self.body.get("cache_salt"), self.body.get("extra_key")])

    @property
    def is_single(self) -> bool:
        """One prompt and one answer: a room holds one."""
        prompt = self.body.get("prompt", self.body.get("text", self.body.get("input_ids")))
        many = isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt)
        sampling = self.body.get("sampling_params")
        n = self.body.get("n") or (sampling.get("n") if isinstance(sampling, dict) else 1) or 1
        return not many and n == 1 and not isinstance(sampling, list)

    @property
    def n_tokens(self) -> int:
        """Of the prompt, estimated."""
        ids = self.body.get("input_ids")
        return len(ids) if isinstance(ids, list) else len(self.prompt) // CHARS_PER_TOKEN

    @property
    def n_new_tokens(self) -> int:
        """Of the answer, at most; a guess where it is not said."""
        sampling = self.body.get("sampling_params")
        inner = sampling.get("max_new_tokens") if isinstance(sampling, dict) else None
        asked = self.body.get("max_tokens") or self.body.get("max_completion_tokens") or inner
        return asked if isinstance(asked, int) else 128


@dataclass(slots=True)
class Answer:
    """What goes back to the client.

    Attributes:
        status: HTTP's.
        headers: those that are kept.
        first: the whole body, or its first piece.
        rest: the pieces behind it; None if there are none.
        stack: what is to be released when the answer has ended.
    """

    status: int
    headers: dict[str, str]
    first: bytes
    rest: AsyncIterator[bytes] | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @classmethod
    def problem(cls, status: int, message: str) -> Answer:
        """An error of the router's own, in the shape of OpenAI's."""
        return cls(
            status,
            {"content-type": "application/json"},
            json.dumps(_error(message, status)).encode(),
        )


class _NodeFailed(Exception):
    """A node did not answer, or with an error of its own; another one may do better."""

    def __init__(self, node: Node, error: str) -> None:
        super().__init__(f"{node.role} node {node.url}: {error}")
        self.node = node


class Relay:
    """Sends requests to pairs of nodes. Belongs to one event loop."""

    def __init__(self, client: httpx.AsyncClient, nodes: Nodes) -> None:
        """``client`` has no limit of time on answers: a model takes as long as it takes."""
        self._client = client
        self._nodes = nodes
        self.retried = 0
        self.without_prefill = 0

    async def ask(self, asked: Asked) -> Answer:
        """The answer, complete or with its first piece; tries other nodes until a piece is there.

        The caller closes ``stack`` when it has sent everything, or the client has left.
        """
        tried: set[str] = set()
        last = "no decode node is up"
        for _ in range(MAX_ATTEMPTS):
            prompt, tenant = asked.prompt, asked.tenant
            decode = self._nodes.pick(DECODE, prompt, tenant, tried)
            if decode is None:
                break
            prefill = None
            if asked.is_single:
                prefill = self._nodes.pick(PREFILL, prompt, tenant, tried)
            if prefill is None:
                self.without_prefill += 1
            try:
                return await self._attempt(asked, prefill, decode)
            except _NodeFailed as failure:
                last = str(failure)
                log.warning("request goes to another node: %s", failure)
                self.retried += 1
                tried.add(failure.node.url)
        return Answer.problem(503, f"no node could serve the request; the last error: {last}")

    async def _attempt(self, asked: Asked, prefill: Node | None, decode: Node) -> Answer:
        async with AsyncExitStack() as stack:
            room = secrets.randbits(63)
            computing: asyncio.Task[Answer | None] | None = None
            bootstrap: dict[str, Any] = {}
            if prefill is not None and prefill.bootstrap is not None:
                host, port = prefill.bootstrap
                bootstrap = {
                    "bootstrap_host": host,
                    "bootstrap_port": port,
                    "bootstrap_room": room,
                }
                computing = asyncio.create_task(self._compute(asked, prefill, bootstrap))
                stack.push_async_callback(_end, computing)
            decoding = asyncio.create_task(self._decode(asked, decode, bootstrap, stack))
            try:
                if computing is not None:
                    await asyncio.wait([computing, decoding], return_when=asyncio.FIRST_COMPLETED)
                    if not decoding.done() and (refusal := await computing) is not None:
                        return refusal
                answer = await decoding
            finally:
                await _end(decoding)  # before the stack closes what it reads from
            answer.stack = stack.pop_all()
            answer.headers["x-hicache-decode"] = decode.url
            if prefill is not None:
                answer.headers["x-hicache-prefill"] = prefill.url
            return answer

    async def _compute(
        self, asked: Asked, node: Node, bootstrap: Mapping[str, Any]
    ) -> Answer | None:
        """The prefill half: None if it went well, or what the node has against the request."""
        body = {**asked.body, **bootstrap, "stream": False}
        body.pop("stream_options", None)
        with node.carrying(asked.n_tokens):
            try:
                response = await self._client.post(
                    node.url + asked.path, json=body, headers=asked.headers
                )
            except httpx.HTTPError as error:
                raise self._failed(node, error) from error
        if response.status_code >= 500:
            raise _NodeFailed(node, f"status {response.status_code}: {response.text[:200]}")
        if response.status_code >= 400:
            return Answer(response.status_code, _kept(response), response.content)
        node.served += 1
        return None

    async def _decode(
        self, asked: Asked, node: Node, bootstrap: Mapping[str, Any], stack: AsyncExitStack
    ) -> Answer:
        """The decode half, until the whole answer or its first piece is there."""
        stack.enter_context(node.carrying(asked.n_tokens + asked.n_new_tokens))
        request = self._client.build_request(
            "POST", node.url + asked.path, json={**asked.body, **bootstrap}, headers=asked.headers
        )
        try:
            response = await self._client.send(request, stream=True)
            stack.push_async_callback(response.aclose)
            if response.status_code >= 500:
                text = (await response.aread())[:200].decode(errors="replace")
                raise _NodeFailed(node, f"status {response.status_code}: {text}")
            if not asked.is_stream or response.status_code >= 400:
                whole = await response.aread()
                node.served += 1
                return Answer(response.status_code, _kept(response), whole)
            pieces = response.aiter_raw()
            first = await anext(pieces, b"")
        except httpx.HTTPError as error:
            raise self._failed(node, error) from error
        return Answer(200, _kept(response), first, self._rest(pieces, node))

    async def _rest(self, pieces: AsyncIterator[bytes], node: Node) -> AsyncIterator[bytes]:
        """The pieces as they come; one that says so if the node is lost."""
        try:
            async for piece in pieces:
                yield piece
            node.served += 1
        except httpx.HTTPError as error:
            failure = self._failed(node, error)
            log.warning("an answer broke off: %s", failure)
            text = json.dumps(_error(f"the answer broke off: {failure}", 502))
            yield f"data: {text}\n\n".encode()

    def _failed(self, node: Node, error: httpx.HTTPError) -> _NodeFailed:
        text = f"{type(error).__name__} {error}".strip()
        self._nodes.failed(node, text)
        return _NodeFailed(node, text)


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancels a task that has not ended; what it raised was for somebody else."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, _NodeFailed):
        await task


def _kept(response: httpx.Response) -> dict[str, str]:
    return {name: response.headers[name] for name in _KEPT if name in response.headers}


def _error(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": status}}
