"""Nodes: the prefill and decode servers behind a router, their health and their load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from hicache_core.disaggregation.affinity import Affinity

log = logging.getLogger(__name__)

PREFILL, DECODE = "prefill", "decode"
AFFINITY_SLACK_TOKENS = 4096
"""A node that knows a prompt may have so many tokens more under way than the idlest one."""


@dataclass(slots=True)
class Node:
    """One server.

    Attributes:
        url: where it answers, without a slash at the end.
        role: prefill or decode.
        is_up: whether it answered when it was asked last.
        transfer_address: where its KV is fetched, of a prefill node that has said so.
        tokens: under way at it, estimated.
        requests: under way at it.
        served: requests that it ended well.
        failures: requests and probes that it did not.
        error: why it is down; empty while it is up.
    """

    url: str
    role: str
    is_up: bool = False
    transfer_address: str = ""
    tokens: int = 0
    requests: int = 0
    served: int = 0
    failures: int = 0
    error: str = "not asked yet"

    @property
    def bootstrap(self) -> tuple[str, int] | None:
        """Where a decode node finds it: its own host by the URL, the port that it told."""
        _, _, port = self.transfer_address.rpartition(":")
        host = urlsplit(self.url).hostname
        return (host, int(port)) if host and port.isdigit() else None

    @contextmanager
    def carrying(self, n_tokens: int) -> Iterator[None]:
        """A request of so many tokens is under way."""
        self.tokens += n_tokens
        self.requests += 1
        try:
            yield
        finally:
            self.tokens -= n_tokens
            self.requests -= 1


class Nodes:
    """All nodes; belongs to one event loop."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        prefill: Sequence[str],
        decode: Sequence[str],
        *,
        api_key: str = "",
        by_prefix: bool = True,
        interval_s: float = 1.0,
        timeout_s: float = 5.0,
    ) -> None:
        """Asks nobody yet; ``client`` stays the caller's, ``api_key`` is for looks alone."""
        self.all = [Node(url.rstrip("/"), PREFILL) for url in prefill]
        self.all += [Node(url.rstrip("/"), DECODE) for url in decode]
        self._client = client
        self._by_prefix = by_prefix
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._affinity = {PREFILL: Affinity(), DECODE: Affinity()}

    async def watch(self) -> None:
        """Asks every node after its health, for ever."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.check_all()

    async def check_all(self) -> None:
        """Asks every node once, all at the same time."""
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

        The one that had the longest beginning of the prompt, unless it has much more to do than
        the idlest one.
        """
        up = [n for n in self.all if n.role == role and n.is_up and n.url not in exclude]
        if not up:
            return None
        idlest = min(up, key=lambda node: (node.tokens, node.requests, node.served))
        known = self._affinity[role].lookup(prompt, tenant) if self._by_prefix else None
        for node in up:
            if node.url == known and node.tokens <= idlest.tokens + AFFINITY_SLACK_TOKENS:
                idlest = node
        self._affinity[role].remember(prompt, tenant, idlest.url)
        return idlest

    def status(self) -> list[dict[str, Any]]:
        """All nodes, for people and tests."""
        return [asdict(node) for node in self.all]

    async def _check(self, node: Node) -> None:
        try:
            await self._get(node, "/health")
            if node.role == PREFILL:
                # Each time: after a restart its KV is fetched somewhere else.
                await self._ask_address(node)
        except httpx.HTTPError as error:
            self.failed(node, f"{type(error).__name__}: {error}".rstrip(": "))
            return
        if not node.is_up:
            log.info("%s node %s is up", node.role, node.url)
        node.is_up, node.error = True, ""

    async def _ask_address(self, node: Node) -> None:
        answer = await self._get(node, "/get_server_info")
        address = ""
        with contextlib.suppress(ValueError, AttributeError):
            address = str(answer.json().get("disaggregation_transfer_address") or "")
        if not address and node.is_up:
            log.warning("%s is no prefill node: it has no transfer address", node.url)
        node.transfer_address = address

    async def _get(self, node: Node, path: str) -> httpx.Response:
        url, timeout_s = node.url + path, self._timeout_s
        answer = await self._client.get(url, timeout=timeout_s, headers=self._headers)
        return answer.raise_for_status()
