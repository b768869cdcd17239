"""The ledger: which of the engine's request ids belongs to which tenant's name for it."""

from __future__ import annotations

import uuid
from collections import OrderedDict

from hicache_core.server.problems import Problem
from hicache_core.types import Namespace

MAX_REQUESTS = 4096


class Ledger:
    """Names of requests. The engine's ids are ours and random; a tenant's own are his alone.

    So two tenants may use the same ``rid``, and none can ask for a request of another.
    """

    def __init__(self) -> None:
        """Empty."""
        self._ids: OrderedDict[tuple[str, Namespace], str] = OrderedDict()
        self._live: set[tuple[str, Namespace]] = set()

    def open(self, name: str | None, namespace: Namespace) -> tuple[str, str]:
        """A new request: the name that its tenant knows, and the engine's id.

        Raises:
            Problem: the tenant has a request of that name under way.
        """
        request_id = uuid.uuid4().hex
        name = name or request_id
        key = (name, namespace)
        if key in self._live:
            raise Problem(400, f"rid {name[:100]!r} is the name of a request under way")
        self._live.add(key)
        self._ids[key] = request_id
        self._ids.move_to_end(key)
        if len(self._ids) > MAX_REQUESTS:
            self._ids.popitem(last=False)
        return name, request_id

    def close(self, name: str, namespace: Namespace) -> None:
        """The request has ended; its name may be used again, and still be asked for."""
        self._live.discard((name, namespace))

    def find(self, name: str, namespace: Namespace) -> str | None:
        """The engine's id of the last request that this tenant called so."""
        return self._ids.get((name, namespace))

    def find_any(self, name: str) -> str | None:
        """The engine's id of the last request that anybody called so; for the operator."""
        for (known, _), request_id in reversed(self._ids.items()):
            if name in (known, request_id):
                return request_id
        return None
