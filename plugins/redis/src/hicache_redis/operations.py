"""The requests of a batch, and how they are pipelined over one connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hicache_core.errors import BackendCorrupt
from hicache_core.plugin.backends import n_leading, nbytes_of
from hicache_core.types import Page
from hicache_redis.channel import Chunk
from hicache_redis.errors import DROPS, MISSES, ErrorReply, reply_error
from hicache_redis.resp import Reply, Wire, command, set_command

_SMALL_STEP = 1024  # keys of one send where nothing large follows
_ASKING = command(b"ASKING")


class Operation(ABC):
    """The same request for each key of a batch; several wires may work on it at once.

    Attributes:
        keys: the full keys in the database, including the prefix.
        answers: whether the server said yes, for each key; no where none has answered.
        nbytes: bytes of payload that the batch moves.
        step: number of keys in one send; at most two steps are in flight.
        stops: whether a connection sends nothing more after its first negative answer.
    """

    verb: ClassVar[str]
    stops: ClassVar[bool] = True

    def __init__(self, keys: Sequence[bytes], nbytes: int = 0, window_nbytes: int = 0) -> None:
        """Prepares the batch; sends nothing.

        Args:
            keys: the full keys in the database, including the prefix.
            nbytes: bytes of payload that the batch moves.
            window_nbytes: bytes that may be in flight on a connection.
        """
        self.keys = keys
        self.answers = [False] * len(keys)
        self.nbytes = nbytes
        self.step = _SMALL_STEP
        if nbytes and keys:
            self.step = max(1, min(_SMALL_STEP, window_nbytes * len(keys) // nbytes // 2))

    @property
    def n_leading(self) -> int:
        """Number of leading keys with a positive answer."""
        return n_leading(self.answers)

    @property
    def n_yes(self) -> int:
        """Number of all keys with a positive answer."""
        return sum(self.answers)

    @abstractmethod
    def request(self, n: int) -> list[Chunk]:
        """Returns the command for ``keys[n]``."""

    def answer(self, wire: Wire, n: int) -> bool | ErrorReply:  # noqa: ARG002 - Fetch needs it
        """Reads the reply for ``keys[n]``: yes, no, or an error reply."""
        return self.verdict(wire.read_reply())

    def verdict(self, reply: Reply) -> bool | ErrorReply:
        """Returns the meaning of a short reply."""
        if isinstance(reply, ErrorReply):
            return reply
        if isinstance(reply, int):
            return reply != 0
        raise BackendCorrupt(f"the server answered {reply!r:.60} where 0 or 1 was due")


class Fetch(Operation):
    """Reads pages. An object that is not as long as its page is a miss; its bytes are skipped."""

    verb = "read"

    def __init__(self, keys: Sequence[bytes], pages: Sequence[Page], window_nbytes: int) -> None:
        """Prepares the batch; sends nothing.

        Args:
            keys: the full keys in the database, including the prefix.
            pages: where to read to, one for each key.
            window_nbytes: bytes that may be in flight on a connection.
        """
        self.pages = list(pages)  # made once: a lazy sequence makes segments at each access
        self._sizes = [nbytes_of(page) for page in pages]
        self.n_wrong_size = 0
        super().__init__(keys, sum(self._sizes), window_nbytes)

    def request(self, n: int) -> list[Chunk]:
        key = self.keys[n]
        return [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key)]

    def answer(self, wire: Wire, n: int) -> bool | ErrorReply:
        if wire.read_page(self.pages[n], self._sizes[n]):
            return True
        length = wire.read_length()
        if isinstance(length, int):
            if length == self._sizes[n]:
                wire.read_payload(self.pages[n])
                return True
            wire.skip_payload(length)
            self.n_wrong_size += 1  # a statistic: two wires at once may lose one
            return False
        if length is None or length.code in MISSES:
            return False
        return length


class FetchEach(Fetch):
    """Reads pages, also behind gaps."""

    stops = False


class FetchAny(Operation):
    """Reads objects of unknown length into new memory, which is in ``values``."""

    verb = "read"

    def __init__(self, keys: Sequence[bytes]) -> None:
        super().__init__(keys)
        self.values: list[bytearray | None] = [None] * len(keys)

    def request(self, n: int) -> list[Chunk]:
        return [command(b"GET", self.keys[n])]

    def answer(self, wire: Wire, n: int) -> bool | ErrorReply:
        length = wire.read_length()
        if isinstance(length, int):
            value = bytearray(length)
            wire.read_payload([memoryview(value)])
            self.values[n] = value
            return True
        return False if length is None or length.code in MISSES else length


class Store(Operation):
    """Stores pages; a full server answers no."""

    verb = "write"

    def __init__(
        self,
        keys: Sequence[bytes],
        pages: Sequence[Page],
        window_nbytes: int,
        ttl_ms: int | None = None,
    ) -> None:
        """Prepares the batch; sends nothing.

        Args:
            keys: the full keys in the database, including the prefix.
            pages: what to store, one for each key.
            window_nbytes: bytes that may be in flight on a connection.
            ttl_ms: lifetime of the objects in milliseconds; None for no limit.
        """
        self.pages = list(pages)  # made once: a lazy sequence makes segments at each access
        self.refusal: ErrorReply | None = None
        self._ttl_ms = ttl_ms
        self._sizes = [nbytes_of(page) for page in pages]
        super().__init__(keys, sum(self._sizes), window_nbytes)

    def request(self, n: int) -> list[Chunk]:
        return set_command(self.keys[n], self.pages[n], self._sizes[n], self._ttl_ms)

    def verdict(self, reply: Reply) -> bool | ErrorReply:
        if isinstance(reply, ErrorReply) and reply.code in DROPS:
            self.refusal = reply
            return False
        return True if reply == b"OK" else super().verdict(reply)


class Count(Operation):
    """Checks which keys are present."""

    verb = "look up"

    def request(self, n: int) -> list[Chunk]:
        key = self.keys[n]
        return [b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(key), key)]


class CountEach(Count):
    """Checks which keys are present, also behind gaps."""

    stops = False


class Remove(Operation):
    """Unlinks keys; the server frees their memory in the background."""

    verb = "delete"
    stops = False

    def request(self, n: int) -> list[Chunk]:
        return [command(b"UNLINK", self.keys[n])]


class Touch(Operation):
    """Makes keys the most recently used; yes for those that are present."""

    verb = "pin"
    stops = False

    def request(self, n: int) -> list[Chunk]:
        return [command(b"TOUCH", self.keys[n])]


class Probe(Operation):
    """Tests the right to write without writing: XX stores only if the key exists."""

    verb = "write"

    def request(self, n: int) -> list[Chunk]:
        return [command(b"SET", self.keys[n], b"", b"XX")]

    def verdict(self, reply: Reply) -> bool | ErrorReply:
        if isinstance(reply, ErrorReply) and reply.code not in DROPS:
            return reply
        return reply == b"OK"


@dataclass(frozen=True, slots=True)
class Redirect:
    """The server says that the slot of ``keys[index]`` has moved, or is moving, to another one."""

    index: int
    address: str
    asking: bool


def run(
    wire: Wire, server: str, operation: Operation, indices: Sequence[int], *, asking: bool = False
) -> list[Redirect]:
    """Runs ``operation.keys[n]`` for each n of ``indices`` over one connection, pipelined.

    Two steps are in flight, so that the server always has the next requests while replies are
    read. More would fill its reply buffers, which count as used memory and would evict pages. When
    this returns, no reply is outstanding.

    Args:
        wire: a connection without outstanding replies; it must be closed if this raises.
        server: its address, for messages.
        operation: the batch.
        indices: of its keys, ascending.
        asking: send ASKING before each request: the slots are moving to this server.

    Returns:
        Keys to send to another server; they have no answer yet.

    Raises:
        BackendError, OSError: the batch has failed; the requests in flight are lost.
    """
    redirects: list[Redirect] = []
    stopped = False
    n_sent = n_read = 0
    while True:
        if n_sent < len(indices) and n_sent - n_read <= operation.step and not stopped:
            buffers: list[Chunk] = []
            for n in indices[n_sent : n_sent + operation.step]:
                if asking:
                    buffers.append(_ASKING)
                buffers += operation.request(n)
                n_sent += 1
            wire.send(buffers)
        elif n_read == n_sent:
            return redirects
        else:
            if asking:
                wire.read_reply()
            n = indices[n_read]
            n_read += 1
            answer = operation.answer(wire, n)
            if isinstance(answer, ErrorReply):
                redirects.append(_redirect(n, answer, (server, operation.verb)))
            elif answer:
                operation.answers[n] = True
            else:
                stopped = operation.stops


def _redirect(n: int, reply: ErrorReply, context: tuple[str, str]) -> Redirect:
    """Returns where the server sends ``keys[n]``.

    Raises:
        BackendError: the reply is another error.
    """
    if reply.code not in ("MOVED", "ASK"):
        raise reply_error(reply, *context)
    address = reply.split(" ")[-1]
    if address.startswith(":"):  # the server does not know its own name: it is the same host
        address = context[0].rpartition(":")[0] + address
    return Redirect(n, address, reply.code == "ASK")
