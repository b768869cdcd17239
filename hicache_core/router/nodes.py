"""Nodes: the prefill and decode servers behind a router, their health and their load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any
from urllib.parse import urlsplit

import httpx

from hicache_core.config.hosts import is_loopback
from hicache_core.router.affinity import Affinity

log = logging.getLogger(__name__)

PREFILL, DECODE = "prefill", "decode"
AFFINITY_SLACK_TOKENS = 4096
"""Tokens that a node that knows a prompt may have in excess of the least loaded node."""
LATE_S = 1.0
"""Seconds: a node that is so late with its health check gets no request that another can take."""
SILENT_S = 10.0
"""Seconds: a node that does not answer for so long is down, and its requests are given up."""
_UNFIT = (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError)
"""Errors of a node that answers badly or not at all."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Settings of a router.

    Attributes:
        prefill: URLs of prefill nodes; if there are none, decode nodes compute prompts too.
        decode: URLs of decode nodes, at least one.
        api_key: for health checks of the nodes; requests bring their own.
        secret: shared with the nodes; None if they listen on this machine only.
        by_prefix: whether to prefer the node that computed most of a prompt before.
        interval_s: seconds between two health checks.
        silent_s: a node that leaves a health check unanswered for this long is down.
    """

    prefill: Sequence[str]
    decode: Sequence[str]
    api_key: str = field(default="", repr=False)
    secret: str | None = field(default=None, repr=False)
    by_prefix: bool = True
    interval_s: float = 1.0
    silent_s: float = SILENT_S


@dataclass(slots=True)
class Node:
    """One server.

    Attributes:
        url: its address, without a slash at the end.
        role: prefill or decode.
        number: among the nodes of its role, from 1.
        is_up: whether it answered when it was asked last.
        transfer_address: where its KV is fetched, of a prefill node that has said so.
        faced_from: the router's own address on the way to it, as far as it is known.
        tokens: estimated tokens of its running requests.
        requests: number of its running requests.
        served: requests that it answered.
        failures: requests and health checks that failed.
        error: why it is down; empty while it is up.
        asked_s: when the health check was sent that it has not answered yet.
    """

    url: str
    role: str
    number: int
    is_up: bool = False
    transfer_address: str = ""
    faced_from: str = ""
    tokens: int = 0
    requests: int = 0
    served: int = 0
    failures: int = 0
    error: str = "not asked yet"
    asked_s: float = inf
    _awaited: set[asyncio.Timeout] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Its name for clients, which do not see addresses of nodes."""
        return f"{self.role} node {self.number}"

    def bootstrap_for(self, decode: Node) -> tuple[str, int] | None:
        """Where ``decode`` finds it: its own host by the URL, the port that it told.

        By a loopback URL it is on the router's machine; elsewhere that machine has another address.
        """
        _, _, port = self.transfer_address.rpartition(":")
        host = urlsplit(self.url).hostname
        if host and is_loopback(host) and not is_loopback(urlsplit(decode.url).hostname or ""):
            host = decode.faced_from or host
        return (host, int(port)) if host and port.isdecimal() else None

    @contextmanager
    def carrying(self, n_tokens: int) -> Iterator[None]:
        """Counts a running request of ``n_tokens`` tokens inside the block."""
        self.tokens += n_tokens
        self.requests += 1
        try:
            yield
        finally:
            self.tokens -= n_tokens
            self.requests -= 1

    @asynccontextmanager
    async def awaited(self) -> AsyncIterator[None]:
        """In this context, waiting ends with TimeoutError if the node stops answering."""
        async with asyncio.timeout(None) as limit:
            self._awaited.add(limit)
            try:
                yield
            finally:
                self._awaited.discard(limit)

    def give_up(self) -> None:
        """Ends all waiting for this node."""
        for limit in self._awaited:
            limit.reschedule(0.0)
        self._awaited.clear()


class Nodes:
    """All nodes; belongs to one event loop."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        settings: RouterSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Sends no health check yet.

        Args:
            client: for health checks; the caller closes it.
            settings: of the router.
            clock: seconds, increasing.
        """
        self.all = [
            Node(url.rstrip("/"), role, number)
            for role, urls in ((PREFILL, settings.prefill), (DECODE, settings.decode))
            for number, url in enumerate(urls, start=1)
        ]
        self._client = client
        self._settings = settings
        key = settings.api_key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._clock = clock
        self._affinity = {PREFILL: Affinity(), DECODE: Affinity()}

    async def watch(self) -> None:
        """Checks the health of all nodes for ever; a slow node does not delay the others."""
        await asyncio.gather(*(self._watch(node) for node in self.all))

    async def check_all(self) -> None:
        """Checks every node once, all at the same time."""
        await asyncio.gather(*(self._check(node) for node in self.all))

    def failed(self, node: Node, error: str) -> None:
        """A request could not be sent to ``node``, or its answer broke off."""
        node.failures += 1
        if node.is_up:
            log.warning("%s node %s is down: %s", node.role, node.url, error)
        node.is_up, node.error = False, error

    def pick(
        self, role: str, prompt: str, tenant: str, exclude: Collection[str] = ()
    ) -> Node | None:
        """The node to use next; None if none is up.

        It prefers the node that computed the longest beginning of the prompt, unless that node is
        much busier than the idlest one. A node whose health check is late is a last resort.

        Args:
            role: prefill or decode.
            prompt: text of the prompt, for affinity.
            tenant: requests of one tenant share prefixes.
            exclude: URLs of nodes that are not used.
        """
        up = [n for n in self.all if n.role == role and n.is_up and n.url not in exclude]
        if not up:
            return None
        late_s = self._clock() - LATE_S
        up = [node for node in up if node.asked_s > late_s] or up
        known = self._affinity[role].lookup(prompt, tenant) if self._settings.by_prefix else None
        chosen = best_of(up, known)
        self._affinity[role].remember(prompt, tenant, chosen.url)
        return chosen

    def status(self) -> list[dict[str, Any]]:
        """The state of all nodes, for ``/router/status``."""
        shown = ("url", "role", "is_up", "transfer_address", "tokens", "requests", "served")
        return [
            {name: getattr(node, name) for name in (*shown, "failures", "error")}
            for node in self.all
        ]

    async def _watch(self, node: Node) -> None:
        while True:
            await asyncio.sleep(self._settings.interval_s)
            await self._check(node)

    async def _check(self, node: Node) -> None:
        node.asked_s = self._clock()
        try:
            await self._get(node, "/health")
            if node.role == PREFILL:
                # Each time: after a restart its KV is fetched somewhere else.
                await self._ask_address(node)
        except (TimeoutError, httpx.TimeoutException):
            # Whoever refuses or resets has told its clients; who is silent never will.
            self.failed(node, f"it does not answer within {self._settings.silent_s:g} s")
            node.give_up()
            return
        except _UNFIT as error:
            self.failed(node, f"{type(error).__name__}: {error}".rstrip(": "))
            return
        finally:
            node.asked_s = inf
        if not node.is_up:
            log.info("%s node %s is up", node.role, node.url)
        node.is_up, node.error = True, ""

    async def _ask_address(self, node: Node) -> None:
        answer = await self._get(node, "/get_server_info")
        address = ""
        with contextlib.suppress(ValueError, AttributeError):
            address = str(answer.json().get("disaggregation_transfer_address") or "")
        if not address and node.is_up:
            log.warning("%s is not a prefill node: it has no transfer address", node.url)
        node.transfer_address = address

    async def _get(self, node: Node, path: str) -> httpx.Response:
        async with asyncio.timeout(self._settings.silent_s):
            answer = await self._client.get(node.url + path, headers=self._headers)
        node.faced_from = _own_end(answer) or node.faced_from
        return answer.raise_for_status()


def best_of(up: Sequence[Node], known: str | None) -> Node:
    """The idlest node, or the one with the URL ``known`` unless it is much busier."""
    idlest = min(up, key=lambda node: (node.tokens, node.requests, node.served))
    for node in up:
        if node.url == known and node.tokens <= idlest.tokens + AFFINITY_SLACK_TOKENS:
            return node
    return idlest


def _own_end(answer: httpx.Response) -> str:
    """The address of this machine from which the question was sent; empty if that is over."""
    stream = answer.extensions.get("network_stream")
    if stream is None:
        return ""
    try:
        return str(stream.get_extra_info("client_addr")[0])
    except (OSError, TypeError):  # closed meanwhile, or no address at all
        return ""
