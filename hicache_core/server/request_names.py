"""RequestNames: the engine's id for each name that a tenant gave to a request."""

from __future__ import annotations

import uuid
from collections import OrderedDict

from hicache_core.server.problems import Problem
from hicache_core.types import Namespace

MAX_REQUESTS = 4096


class RequestNames:
    """Maps the names that tenants give to their requests to the engine's random ids.

    Names are separate for each tenant: two may use the same ``rid``, and neither can ask about a
    request of the other.
    """

    def __init__(self) -> None:
        """Empty."""
        self._ids: OrderedDict[tuple[str, Namespace], str] = OrderedDict()
        self._live: set[tuple[str, Namespace]] = set()

    def open(self, name: str | None, namespace: Namespace) -> tuple[str, str]:
        """Registers a request; returns the tenant's name and the engine's id for it.

        Raises:
            Problem: the tenant has a running request of that name.
        """
        request_id = uuid.uuid4().hex
        name = name or request_id
        key = (name, namespace)
        if key in self._live:
            raise Problem(
                400, f"a request with rid {name[:100]!r} is still running; use another rid"
            )
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
        """The engine's id of the tenant's latest request of that name; None if unknown."""
        return self._ids.get((name, namespace))

    def find_any(self, name: str) -> str | None:
        """The engine's id of the latest request of that name of any tenant; for the operator."""
        for (known, _), request_id in reversed(self._ids.items()):
            if name in (known, request_id):
                return request_id
        return None
