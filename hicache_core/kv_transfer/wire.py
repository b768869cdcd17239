"""Frames between two nodes: a fixed header, then JSON, rows or nothing; connections with limits."""

from __future__ import annotations

import contextlib
import enum
import json
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from hicache_core.errors import PeerRefused, TransferError

PROTOCOL = 2
MAX_JSON_NBYTES = 256 << 10
MAX_NOTE_NBYTES = 64 << 10
SOCKET_BUFFER_NBYTES = 4 << 20
LEAST_NBYTES_PER_S = 256 << 10
_IOV_MAX = 1024
_MAGIC = b"HCKV"
_HEADER = struct.Struct("<4sBxHIIQQQ")


class Kind(enum.IntEnum):
    """What a frame is; the arrow tells who sends it (D decode, P prefill)."""

    HELLO = 1  # D→P, JSON: protocol, identity, rank, heads
    WELCOME = 2  # P→D, JSON: heads, and what the carrier needs
    WANT = 3  # D→P, JSON: heads (or none), start, stop
    LAYER = 4  # P→D: rows [start, stop) of a layer, as the carrier moves them
    PING = 5  # P→D, JSON: nothing yet for you; how much was computed for anybody
    END = 6  # P→D: the note; everything was sent
    ACK = 7  # D→P: everything arrived
    FAILED = 8  # either, text: the room has failed
    REFUSED = 9  # P→D, text: we do not fit; the same would happen again
    CHALLENGE = 10  # both, JSON: a nonce, before HELLO, where a secret is shared
    PROOF = 11  # both, JSON: that the secret is known


@dataclass(frozen=True, slots=True)
class Frame:
    """The header of a frame.

    Attributes:
        kind: of the frame.
        room: number of the request.
        layer: for LAYER, its number in the page memory, groups included.
        start: for LAYER, position of the first token.
        stop: for LAYER, position after the last token.
        nbytes: bytes that follow the header.
        checksum: xxh3-64 of the rows (LAYER) or of the bytes that follow.
    """

    kind: Kind
    room: int
    layer: int = 0
    start: int = 0
    stop: int = 0
    nbytes: int = 0
    checksum: int = 0


def checksum_of(segments: Sequence[memoryview | bytes]) -> int:
    """xxh3-64 of all bytes in order."""
    digest = xxhash.xxh3_64()
    for segment in segments:
        digest.update(segment)
    return digest.intdigest()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a peer may make no progress.

    Attributes:
        idle_timeout_s: a peer without progress for this long is lost.
        least_nbytes_per_s: slower transfers count as no progress.
    """

    idle_timeout_s: float
    least_nbytes_per_s: float = LEAST_NBYTES_PER_S


class Connection:
    """A socket for frames whose peer must make progress, and which ends before ``deadline``.

    ``renew`` reports progress. Between two calls, received bytes extend the time at the least rate,
    so that a byte now and then does not. One thread sends and receives; any thread may call
    ``shutdown``.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        patience: Patience,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes over a connected socket.

        Args:
            sock: the socket.
            peer: the other side, in words, for messages.
            patience: how long the peer may be without progress.
            deadline: by ``clock``, when everything must have ended.
            clock: seconds, increasing.
        """
        self.peer = peer
        self._sock = sock
        self._patience = patience
        self.deadline = deadline
        self._clock = clock
        self._progress_at = clock()
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def reached_at(self) -> str:
        """The local address of the connection; empty once the connection is lost."""
        try:
            return str(self._sock.getsockname()[0])
        except OSError:
            return ""

    def renew(self) -> None:
        """Restarts the time limit: the peer made progress, or was not waited for."""
        self._progress_at = self._clock()

    def shutdown(self) -> None:
        """Ends both directions, so that a running call in any thread fails at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Releases the socket; called by the thread that uses it."""
        self._sock.close()

    def send(self, frame: Frame, segments: Sequence[memoryview | bytes] = ()) -> None:
        """Sends a header and its content; a peer that reads nothing for too long is lost."""
        header = _HEADER.pack(
            _MAGIC,
            frame.kind,
            frame.layer,
            frame.start,
            frame.stop,
            frame.room,
            frame.nbytes,
            frame.checksum,
        )
        try:
            self._send_all([header, *segments])
        except TimeoutError as error:
            raise self._silent() from error
        except OSError as error:
            raise TransferError(f"the connection to {self.peer} was lost: {error}") from error

    def send_text(self, kind: Kind, room: int, text: bytes) -> None:
        """Sends a frame with a short text.

        Args:
            kind: of the frame.
            room: number of the request.
            text: the payload.
        """
        self.send(Frame(kind, room, nbytes=len(text), checksum=checksum_of([text])), [text])

    def send_json(self, kind: Kind, room: int, value: dict[str, Any]) -> None:
        """Sends a frame with a JSON object.

        Args:
            kind: of the frame.
            room: number of the request.
            value: the payload.
        """
        self.send_text(kind, room, json.dumps(value).encode())

    def receive(self) -> Frame:
        """The next header.

        Raises:
            TransferError: the connection ended, the peer is silent, or it sent no frame.
            PeerRefused: the peer refused the request.
        """
        raw = bytearray(_HEADER.size)
        self.receive_into([memoryview(raw)])
        magic, kind, layer, start, stop, room, nbytes, checksum = _HEADER.unpack(raw)
        if magic != _MAGIC or kind not in Kind._value2member_map_:
            raise TransferError(f"{self.peer} does not speak the protocol of KV transfers")
        frame = Frame(Kind(kind), room, layer, start, stop, nbytes, checksum)
        if frame.kind is Kind.REFUSED:
            raise PeerRefused(f"{self.peer} refused: {self._words_of(frame)}")
        if frame.kind is Kind.FAILED:
            raise TransferError(f"{self.peer} gave up: {self._words_of(frame)}")
        return frame

    def receive_json(self, kind: Kind) -> tuple[int, dict[str, Any]]:
        """The room and the JSON object of the next frame, which must be of ``kind``."""
        frame = self.receive()
        if frame.kind is not kind:
            raise TransferError(f"{self.peer} sent {frame.kind.name} instead of {kind.name}")
        return frame.room, self.json_of(frame)

    def json_of(self, frame: Frame) -> dict[str, Any]:
        """Receives the content of ``frame`` as a JSON object."""
        try:
            value = json.loads(self.text_of(frame))
        except (ValueError, RecursionError) as error:
            raise TransferError(
                f"{self.peer} sent no JSON in {frame.kind.name}: {error}"
            ) from error
        if not isinstance(value, dict):
            raise TransferError(f"{self.peer} sent no object in {frame.kind.name}")
        return value

    def text_of(self, frame: Frame) -> bytes:
        """Receives the content of ``frame`` and checks its checksum."""
        if frame.nbytes > MAX_JSON_NBYTES:
            raise TransferError(
                f"{self.peer} sent {frame.nbytes} bytes in {frame.kind.name}; "
                f"{MAX_JSON_NBYTES} are allowed"
            )
        text = bytearray(frame.nbytes)
        self.receive_into([memoryview(text)])
        if checksum_of([bytes(text)]) != frame.checksum:
            raise TransferError(f"the checksum of {frame.kind.name} from {self.peer} is wrong")
        return bytes(text)

    def _words_of(self, frame: Frame) -> str:
        return self.text_of(frame).decode(errors="replace")

    def receive_into(self, segments: Sequence[memoryview]) -> None:
        """Fills ``segments`` in order, straight from the socket."""
        left = [segment for segment in segments if segment.nbytes]
        try:
            first = 0
            while first < len(left):
                self._wait_at_most()
                n = self._sock.recvmsg_into(left[first : first + _IOV_MAX])[0]
                if n == 0:
                    raise TransferError(f"{self.peer} closed the connection")
                self._have_moved(n)
                first = _skip(left, first, n)
        except TimeoutError as error:
            raise self._silent() from error
        except TransferError:
            raise
        except OSError as error:
            raise TransferError(f"the connection to {self.peer} was lost: {error}") from error

    def is_gone(self) -> bool:
        """Whether the peer has closed; returns at once."""
        try:
            self._sock.settimeout(0.0)
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _send_all(self, parts: list[memoryview | bytes]) -> None:
        left = [memoryview(part) for part in parts if len(part)]
        first = 0
        while first < len(left):
            self._wait_at_most()
            n = self._sock.sendmsg(left[first : first + _IOV_MAX])
            self._have_moved(n)
            first = _skip(left, first, n)

    def _have_moved(self, nbytes: int) -> None:
        bought_s = nbytes / self._patience.least_nbytes_per_s
        self._progress_at = min(self._clock(), self._progress_at + bought_s)

    def _wait_at_most(self) -> None:
        left_s = min(self.deadline, self._progress_at + self._patience.idle_timeout_s)
        left_s -= self._clock()
        if left_s <= 0:
            raise TimeoutError
        self._sock.settimeout(left_s)

    def _silent(self) -> TransferError:
        if self._clock() >= self.deadline:
            return TransferError(f"the time of the transfer with {self.peer} is over")
        idle_s = self._patience.idle_timeout_s
        return TransferError(f"{self.peer} made no progress for {idle_s:g} s")


def _skip(segments: list[memoryview], first: int, n: int) -> int:
    """Index of the first segment that is not done after ``n`` bytes, which is cut to its rest."""
    while first < len(segments) and n >= segments[first].nbytes:
        n -= segments[first].nbytes
        first += 1
    if n:
        segments[first] = segments[first][n:]
    return first
