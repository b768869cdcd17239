"""The publisher of KV events: routers learn which pages each tier holds. ``docs/kv-events.md``."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import zmq

from hicache_core.errors import ConfigError
from hicache_core.kv.keys import TOKEN_NBYTES
from hicache_core.observe import event_format
from hicache_core.observe.event_format import CLEARED, END_OF_REPLAY, Event
from hicache_core.observe.event_settings import EventsConfig
from hicache_core.observe.journal import Journal, PageRun
from hicache_core.observe.replay import ReplayBuffer
from hicache_core.observe.snapshot import EventsStatus
from hicache_core.process.main_thread import main_has_ended
from hicache_core.types import Namespace, Tier

__all__ = ["EventsConfig", "KvEvents"]

log = logging.getLogger(__name__)

_LOOK_MS = 1000
"""How often the thread checks that the main thread still runs."""

MAX_TURN_RUNS = 64
"""Runs that are sent before the thread checks for replays and ``close`` again."""
MAX_BATCH_TOKENS = 8192
"""Tokens in a batch. Packing is C code that holds Python's lock: batches are small, so that no step
of an engine waits for one."""
MAX_NAMESPACES = 65_536
"""Namespaces that are remembered; the hashes of a forgotten one still differ from all others."""


class _Change(NamedTuple):
    """What the owner thread says; becomes an event on the publisher's thread."""

    tier: Tier | None  # None: everything is gone
    run: PageRun | None
    is_stored: bool = False
    namespace: Namespace | None = None  # None: the names of the run's seed are not known

    def events(self) -> Iterator[tuple[Event, int]]:
        """The events that tell it, each with its number of tokens."""
        if self.tier is None or self.run is None:
            yield CLEARED, 0
        elif not self.is_stored:
            yield event_format.removed(self.tier, self.run), 0
        else:
            for piece in event_format.pieces(self.run, MAX_BATCH_TOKENS):
                event = event_format.stored(self.tier, piece, self.namespace)
                yield event, len(piece.tokens) // TOKEN_NBYTES


_CLEARED = _Change(None, None)
_DEFAULT = Namespace()


class KvEvents(Journal):
    """Publishes what a cache's tiers gain and lose.

    The owner thread only puts runs of pages into a queue; the publisher's thread packs and sends
    them. Sequence numbers count the batches, so a subscriber that sees a gap has lost some and asks
    for a replay. They start at the current time, so that the numbers of a restarted process are
    higher than before. The first batch is ``AllBlocksCleared``, since the pages of the process
    before are gone. If the thread cannot keep up and the queue is full, everything queued is
    dropped and ``AllBlocksCleared`` is sent instead: a subscriber may then miss pages, but never
    knows pages that are not there.
    """

    def __init__(
        self, config: EventsConfig, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """Binds nothing yet.

        Args:
            config: where to publish.
            wall_clock: seconds since 1970, for the first number and the time stamps of batches.
        """
        self._config = config
        self._wall_clock = wall_clock
        self._lock = threading.Lock()  # around the queue and the numbers below
        self._queue: deque[_Change] = deque()
        self._names: OrderedDict[bytes, Namespace] = OrderedDict()  # by seed; the owner's
        self._n_dropped = 0
        self._closing = False
        self._pack = event_format.PACKERS[config.format]
        first_seq = int(wall_clock() * 1_000_000)  # below 2**53, and no batch takes a microsecond
        self._replay = ReplayBuffer(config.buffer_steps, config.buffer_nbytes, first_seq)
        self._link: _Link | None = None
        self._thread: threading.Thread | None = None

    # The owner thread.

    def named(self, seed: bytes, namespace: Namespace) -> None:
        # docstring inherited
        self._names[seed] = namespace
        self._names.move_to_end(seed)
        if len(self._names) > MAX_NAMESPACES:
            self._names.popitem(last=False)

    def stored(self, tier: Tier, run: PageRun) -> None:
        # docstring inherited
        if run.group is not None and not self._config.groups:
            return
        namespace = self._names.get(run.seed) if run.seed else _DEFAULT
        self._put(_Change(tier, run, is_stored=True, namespace=namespace))

    def removed(self, tier: Tier, run: PageRun, cause: str) -> None:  # noqa: ARG002 - not on the wire
        # docstring inherited
        if run.group is None or self._config.groups:
            self._put(_Change(tier, run))

    def cleared(self) -> None:
        # docstring inherited
        self._put(_CLEARED)

    def _put(self, change: _Change) -> None:
        with self._lock:
            if self._closing:
                return
            queue = self._queue
            if len(queue) >= self._config.queue_runs:
                self._n_dropped += sum(item is not _CLEARED for item in queue)
                queue.clear()
                queue.append(_CLEARED)
            queue.append(change)
            if self._link is not None and len(queue) <= 2:
                self._link.wake()  # one byte does for all that is queued until the thread looks

    # Life.

    def open(self) -> None:
        """Opens the sockets and starts the thread.

        Raises:
            ConfigError: an endpoint is malformed or taken.
        """
        self._link = _Link(self._config)
        with self._lock:
            self._queue.appendleft(_CLEARED)  # whatever a process before this one had
            self._link.wake()
        self._thread = threading.Thread(target=self._run, args=(self._link,), name="hicache-events")
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """Sends what is queued for at most ``timeout_s``, then stops; may be called twice.

        Later events are ignored.
        """
        with self._lock:
            is_first, self._closing = not self._closing, True
            if is_first and self._link is not None:
                self._link.deadline = time.monotonic() + timeout_s
                self._link.wake()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._queue:
                log.warning("KV events: %d were not sent before close", len(self._queue))
            self._queue.clear()

    @property
    def endpoint(self) -> str:
        """The address that the PUB socket has now, once open."""
        assert self._link is not None
        return self._link.endpoint

    @property
    def replay_endpoint(self) -> str:
        """The address for replays, once open; empty without one."""
        assert self._link is not None
        return self._link.replay_endpoint

    def status(self) -> EventsStatus:
        """Numbers so far; from any thread."""
        with self._lock:
            return EventsStatus(self._replay.n_batches, self._n_dropped, len(self._queue))

    # The publisher's thread.

    def _run(self, link: _Link) -> None:
        try:
            while not main_has_ended() and (
                not self._closing or (self._queue and time.monotonic() < link.deadline)
            ):
                for request in link.wait(0 if self._queue else _LOOK_MS):
                    self._answer(link, *request)
                self._publish(link)
        finally:
            with self._lock:
                self._closing = True
            if main_has_ended():
                link.deadline = 0.0  # nobody said how long to wait for slow subscribers
            link.close()

    def _publish(self, link: _Link) -> None:
        """Sends what is queued, up to ``MAX_TURN_RUNS`` runs, in small batches."""
        with self._lock:
            queue = self._queue
            changes = [queue.popleft() for _ in range(min(len(queue), MAX_TURN_RUNS))]
        batch: list[Event] = []
        n_tokens = 0
        for event, n in (pair for change in changes for pair in change.events()):
            if n_tokens + n > MAX_BATCH_TOKENS:
                self._send(link, batch)
                batch, n_tokens = [], 0
            batch.append(event)
            n_tokens += n
        self._send(link, batch)

    def _send(self, link: _Link, events: Sequence[Event]) -> None:
        if events:
            payload = self._pack(self._wall_clock(), events, self._config.dp_rank)
            link.publish(self._replay.add(payload), payload)

    def _answer(self, link: _Link, client: bytes, start_seq: int) -> None:
        for seq, payload in self._replay.since(start_seq):
            link.reply(client, seq.to_bytes(8, "big"), payload)
        link.end_replay(client)


class _Link:
    """The sockets: made by the opening thread, then used by the publisher's thread alone.

    Only ``wake`` and ``deadline`` are for others.
    """

    def __init__(self, config: EventsConfig) -> None:
        self.deadline = float("inf")
        self.replay_endpoint = ""
        self._topic = config.topic.encode()
        self._context = zmq.Context()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        self._pub.set_hwm(config.hwm)
        self._router.sndhwm = config.buffer_steps + 1  # or a long replay would lose its end
        self._poller = zmq.Poller()
        self._poller.register(self._wake_out.fileno(), zmq.POLLIN)
        try:
            self.endpoint = _attach(self._pub, config.endpoint, config.dp_rank, bind=config.bind)
            if config.replay_endpoint is not None:
                self.replay_endpoint = _attach(
                    self._router, config.replay_endpoint, config.dp_rank, bind=True
                )
                self._poller.register(self._router, zmq.POLLIN)
        except ConfigError:
            self.deadline = 0.0
            self.close()
            raise

    def wake(self) -> None:
        """Ends ``wait``; holds the publisher's lock, so that nothing is closed meanwhile."""
        with contextlib.suppress(BlockingIOError):  # full of bytes that will wake it
            self._wake_in.send(b"\0")

    def wait(self, timeout_ms: int) -> list[tuple[bytes, int]]:
        """Waits for ``wake`` or requests; returns the replay requests: client and first number."""
        ready = dict(self._poller.poll(timeout_ms))
        if self._wake_out.fileno() in ready:
            self._wake_out.recv(4096)
        if self._router not in ready:
            return []
        frames = self._router.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            log.warning("KV events: ignored a malformed replay request of %d frames", len(frames))
            return []
        return [(frames[0], int.from_bytes(frames[2], "big"))]

    def publish(self, seq: int, payload: bytes) -> None:
        """Hands one batch to all subscribers; a slow one loses it beyond its high-water mark."""
        self._pub.send_multipart((self._topic, seq.to_bytes(8, "big"), payload))

    def reply(self, client: bytes, seq: bytes, payload: bytes) -> None:
        """Sends one batch of a replay."""
        self._router.send_multipart((client, b"", self._topic, seq, payload))

    def end_replay(self, client: bytes) -> None:
        """Tells that the replay is complete."""
        self._router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    def close(self) -> None:
        """Closes the sockets; waits until the deadline for bytes that are being sent."""
        left_s = min(max(0.0, self.deadline - time.monotonic()), 60.0)
        self._context.destroy(linger=int(left_s * 1000))
        self._wake_in.close()
        self._wake_out.close()


def _attach(sock: zmq.Socket[bytes], endpoint: str, dp_rank: int, *, bind: bool) -> str:
    """Binds or connects the socket and returns its address."""
    address = for_rank(endpoint, dp_rank)
    try:
        if bind:
            sock.bind(address)
            return sock.getsockopt_string(zmq.LAST_ENDPOINT)
        sock.connect(address)
        return address
    except zmq.ZMQError as error:
        raise ConfigError(
            f"KV events: cannot {'bind' if bind else 'connect to'} {address!r}: {error}; "
            "give a free address such as tcp://127.0.0.1:5557"
        ) from error


def for_rank(endpoint: str, dp_rank: int) -> str:
    """The address of a data-parallel rank: a TCP port plus the rank, or a suffix elsewhere."""
    if dp_rank == 0:
        return endpoint
    head, _, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp://"):
        return f"{head}:{int(port) + dp_rank}" if port.isdigit() else endpoint
    return f"{endpoint}_dp{dp_rank}"
