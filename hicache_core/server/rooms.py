"""Rooms: which meeting places of prefill and decode a node takes from a request."""

from __future__ import annotations

import hmac

from hicache_core.config.hosts import is_loopback
from hicache_core.engine.request import Bootstrap
from hicache_core.kv_transfer.secret import room_proof
from hicache_core.server.bodies import Shared
from hicache_core.server.problems import Problem


class Rooms:
    """Takes rooms from the router alone, which proves that it knows the secret.

    Without a secret a node listens on this machine only; it takes rooms on this machine then. Who
    may name a room makes a decode node fetch KV, and keep it for everybody.
    """

    def __init__(self, secret: str | None) -> None:
        """``secret`` is that of router and nodes; None for none."""
        self._secret = secret

    def room_of(self, body: Shared) -> Bootstrap | None:
        """Where the halves of a request meet; None if it has no halves.

        Raises:
            Problem: 403, the node does not take the room.
        """
        room = body.bootstrap
        if room is None:
            return None
        if self._secret is None:
            if not is_loopback(room.host):
                raise Problem(
                    403,
                    "without --disaggregation-secret this node accepts only rooms on this machine; "
                    "start router and nodes with the same secret",
                    param="bootstrap_host",
                )
            return room
        proof = room_proof(self._secret, room.host, room.port, room.room)
        if not hmac.compare_digest(proof.encode(), (body.bootstrap_proof or "").encode()):
            raise Problem(
                403,
                "this node accepts rooms from its router only; start router and nodes with the "
                "same --disaggregation-secret",
                param="bootstrap_room",
            )
        return room
