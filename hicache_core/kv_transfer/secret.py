"""SharedSecret: nodes and their router prove to each other that they know the secret."""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets

from hicache_core.errors import HiCacheError, PeerRefused, TransferError
from hicache_core.kv_transfer.wire import Connection, Kind

log = logging.getLogger(__name__)

MIN_LENGTH = 16
_NONCE_NBYTES = 32
_HINT = "start both nodes with the same --disaggregation-secret"


class SharedSecret:
    """Challenge and response between two nodes, both ways, by HMAC-SHA256 (RFC 2104).

    It comes before anything else on a connection. The secret itself is never sent.

    ::

        decode   CHALLENGE nonce                 →
                                                 ←  CHALLENGE nonce   prefill
                 PROOF of (decode, both nonces)  →
                                                 ←  PROOF of (prefill, both nonces)

    Without a secret there is no challenge. The secret authenticates; it does not encrypt.
    """

    def __init__(self, secret: str | None) -> None:
        """Keeps the secret; None for no authentication."""
        self._key = None if secret is None else secret.encode()

    def prove_to(self, peer: Connection) -> None:
        """Plays the decode node's part on a new connection.

        Raises:
            PeerRefused: the two nodes have different secrets.
            TransferError: the connection was lost.
        """
        if self._key is None:
            return
        mine = _nonce()
        try:
            peer.send_json(Kind.CHALLENGE, 0, {"nonce": mine})
            nonces = mine + _word(peer.receive_json(Kind.CHALLENGE)[1], "nonce")
            peer.send_json(Kind.PROOF, 0, {"proof": self._proof("decode", nonces)})
            theirs = _word(peer.receive_json(Kind.PROOF)[1], "proof")
        except PeerRefused:
            raise
        except TransferError as error:
            raise PeerRefused(
                f"{peer.peer} does not prove that it knows the shared secret ({error}); {_HINT}"
            ) from error
        if not hmac.compare_digest(theirs, self._proof("prefill", nonces)):
            raise PeerRefused(f"{peer.peer} has another shared secret; {_HINT}")

    def admit(self, peer: Connection) -> bool:
        """Plays the prefill node's part; False if the peer was refused, which it has been told."""
        if self._key is None:
            return True
        try:
            self._examine(peer)
        except HiCacheError as error:
            log.error("refused %s: %s", peer.peer, error)
            with contextlib.suppress(TransferError):  # it may be gone
                peer.send_text(Kind.REFUSED, 0, str(error).encode())
            return False
        return True

    def _examine(self, peer: Connection) -> None:
        frame = peer.receive()
        if frame.kind is Kind.HELLO:
            raise PeerRefused(f"this prefill node wants a shared secret; {_HINT}")
        if frame.kind is not Kind.CHALLENGE:
            raise TransferError(f"{frame.kind.name} came first")
        theirs = _word(peer.json_of(frame), "nonce")
        mine = _nonce()
        peer.send_json(Kind.CHALLENGE, 0, {"nonce": mine})
        proof = _word(peer.receive_json(Kind.PROOF)[1], "proof")
        if not hmac.compare_digest(proof, self._proof("decode", theirs + mine)):
            raise PeerRefused(f"the two nodes have different shared secrets; {_HINT}")
        peer.send_json(Kind.PROOF, 0, {"proof": self._proof("prefill", theirs + mine)})

    def _proof(self, who: str, nonces: str) -> str:
        """The HMAC of a side; it covers the name of the side, so that no proof can be reflected."""
        assert self._key is not None
        return hmac.new(self._key, f"hicache-kv {who} {nonces}".encode(), "sha256").hexdigest()


def room_proof(secret: str, host: str, port: int, room: int) -> str:
    """The router's proof that it named a room: HMAC-SHA256, 64 hexadecimal digits.

    A third party that reads it can name the same room again, but no other; a room is used once.

    Args:
        secret: of the nodes and the router.
        host: of the prefill node.
        port: of the prefill node.
        room: number of the request.
    """
    words = f"hicache-room {room} {port} {host}"
    return hmac.new(secret.encode(), words.encode(), "sha256").hexdigest()


def _nonce() -> str:
    return secrets.token_hex(_NONCE_NBYTES)


def _word(value: dict[str, object], name: str) -> str:
    """A nonce or a proof: both are 64 hexadecimal digits.

    Raises:
        TransferError: it is none.
    """
    word = value.get(name)
    digits = set("0123456789abcdef")
    if not isinstance(word, str) or len(word) != 2 * _NONCE_NBYTES or not digits.issuperset(word):
        raise TransferError(f"a malformed {name} was sent")
    return word
