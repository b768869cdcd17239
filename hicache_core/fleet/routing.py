"""Routing: which server gets a request. Two policies are those of ``hicache router``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hicache_core.errors import ConfigError
from hicache_core.router.affinity import Affinity
from hicache_core.router.nodes import DECODE, Node, best_of


class Router(ABC):
    """Chooses servers by their numbers."""

    @abstractmethod
    def pick(self, prompt: bytes, n_tokens: int) -> int:
        """The server for a request.

        Args:
            prompt: packed token ids.
            n_tokens: of prompt and answer.
        """

    @abstractmethod
    def ended(self, server: int, n_tokens: int) -> None:
        """A request of ``n_tokens`` that ``server`` had has ended."""


class RoundRobin(Router):
    """Each server in turn."""

    def __init__(self, n_servers: int) -> None:
        """Begins with server 0."""
        self._n_servers = n_servers
        self._next = 0

    def pick(self, prompt: bytes, n_tokens: int) -> int:  # noqa: ARG002
        # docstring inherited
        server = self._next
        self._next = (server + 1) % self._n_servers
        return server

    def ended(self, server: int, n_tokens: int) -> None:
        # docstring inherited
        pass


class ByLoad(Router):
    """The server whose running requests have the fewest tokens."""

    def __init__(self, n_servers: int) -> None:
        """All servers are idle."""
        self._nodes = [
            Node(str(number), DECODE, number + 1, is_up=True) for number in range(n_servers)
        ]

    def pick(self, prompt: bytes, n_tokens: int) -> int:
        # docstring inherited
        node = best_of(self._nodes, self._known(prompt))
        node.tokens += n_tokens
        node.requests += 1
        return int(node.url)

    def ended(self, server: int, n_tokens: int) -> None:
        # docstring inherited
        node = self._nodes[server]
        node.tokens -= n_tokens
        node.requests -= 1
        node.served += 1

    def _known(self, prompt: bytes) -> str | None:  # noqa: ARG002
        """The node that has computed most of a prompt."""
        return None


class ByPrefix(ByLoad):
    """The server that has computed most of the prompt, unless another one has much less to do."""

    def __init__(self, n_servers: int) -> None:
        """Knows no prompt."""
        super().__init__(n_servers)
        self._affinity = Affinity()

    def pick(self, prompt: bytes, n_tokens: int) -> int:
        # docstring inherited
        server = super().pick(prompt, n_tokens)
        self._affinity.remember(_as_text(prompt), "", self._nodes[server].url)
        return server

    def _known(self, prompt: bytes) -> str | None:
        return self._affinity.lookup(_as_text(prompt), "")


def _as_text(prompt: bytes) -> str:
    """Four characters a token, about as many as in English: the router compares characters."""
    return prompt.decode("latin-1")


ROUTERS: dict[str, type[RoundRobin] | type[ByLoad]] = {
    "prefix": ByPrefix,
    "load": ByLoad,
    "round-robin": RoundRobin,
}


def make_router(name: str, n_servers: int) -> Router:
    """The router of a name; for one server there is nothing to choose.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ROUTERS:
        raise ConfigError(f"no router policy {name!r}; the policies are: {', '.join(ROUTERS)}")
    return ROUTERS[name](n_servers) if n_servers > 1 else RoundRobin(1)
