"""Peers that are there and do no good: each costs its own request, and that not for long."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hicache_core.errors import TransferError
from hicache_core.kv_transfer.base import TransferContext, TransferState
from hicache_core.kv_transfer.carrier import InlineCarrier
from hicache_core.kv_transfer.handshake import welcome_of
from hicache_core.kv_transfer.peers import PeerConfig, PeerTransfer
from hicache_core.kv_transfer.wire import Connection, Frame, Kind, Patience, checksum_of
from hicache_core.testing.transfer_kit import ROOM, WAIT_S, Node, memory_of, spec_of
from tests.scarce import no_file_descriptors

DEEP = b"[" * 200_000
Script = Callable[[Connection, threading.Event], None]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kv-")]


@contextlib.contextmanager
def prefill_that(script: Script) -> Iterator[str]:
    """The address of a prefill node that says what ``script`` says, to one receiver."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener.accept()[0] as sock, contextlib.suppress(Exception):
            peer = Connection(sock, "decode", Patience(WAIT_S), float("inf"))
            peer.receive_json(Kind.HELLO)
            script(peer, over)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        thread.join()
        listener.close()


@contextlib.contextmanager
def node(seed: int | None = None, **settings: Any) -> Iterator[Node]:
    """An open node that is patient for half a second."""
    news, memory = threading.Event(), memory_of(spec_of(), seed)
    config = PeerConfig(**{"ping_s": 0.05, "idle_timeout_s": 0.5, **settings})
    backend = PeerTransfer(config, TransferContext(memory, on_notice=news.set), InlineCarrier())
    backend.open()
    try:
        yield Node(memory, backend, news)
    finally:
        backend.close()


def shake(peer: Connection) -> None:
    """A handshake without a fault."""
    peer.send_json(Kind.WELCOME, ROOM, welcome_of(memory_of(spec_of(), None), {}, []))
    peer.receive_json(Kind.WANT)


def says(kind: Kind, text: bytes) -> Script:
    def script(peer: Connection, over: threading.Event) -> None:
        peer.send_text(kind, ROOM, text)
        over.wait()

    return script


def only_pings(peer: Connection, over: threading.Event) -> None:
    shake(peer)
    while not over.wait(0.05):
        peer.send_json(Kind.PING, ROOM, {"computed": 7})


def drips_rows(peer: Connection, over: threading.Event) -> None:
    shake(peer)
    peer.send(Frame(Kind.LAYER, ROOM, 0, 0, 4, nbytes=4 * 160, checksum=0))
    while not over.wait(0.05):
        peer._sock.send(b"\0")


def breaks_our_code(peer: Connection, over: threading.Event) -> None:
    """Stands for what nobody has foreseen; see the test."""
    shake(peer)
    peer.send(Frame(Kind.LAYER, ROOM, 0, 0, 4, nbytes=1, checksum=0))
    over.wait()


def error_of(script: Script) -> str:
    """How a room ends whose prefill node follows ``script``; it may take 30 s, and must not."""
    with prefill_that(script) as address, node() as decode:
        decode.backend.receive(ROOM, [address], [0], (0, 4), WAIT_S)
        notice = decode.notice()
        assert notice.state is TransferState.FAILED
        assert notice.elapsed_s < WAIT_S / 2
        return notice.error


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (says(Kind.FAILED, b"\xff\xfe bad"), "gave up: \ufffd\ufffd bad"),
        (says(Kind.REFUSED, b"\xff\xfe bad"), "refused: \ufffd\ufffd bad"),
        (says(Kind.WELCOME, DEEP), "sent no JSON in WELCOME"),
        (says(Kind.WELCOME, b'{"heads": [0, 1e999], "carrier": {}}'), "a malformed welcome"),
        (only_pings, "made no progress for 0.5 s"),
        (drips_rows, "made no progress for 0.5 s"),
    ],
)
def test_nonsense_fails_the_room_at_once_and_delay_soon(script: Script, error: str) -> None:
    assert error in error_of(script)


def test_what_nobody_has_foreseen_fails_the_room_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(InlineCarrier, "receive_rows", breaks)
    assert error_of(breaks_our_code) == "the transfer broke: ZeroDivisionError: a bug of ours"


def test_a_prefill_node_that_gets_on_with_others_is_waited_for() -> None:
    """Longer than it may be idle: the rows of other rooms are computed first."""
    with node(seed=1) as prefill, node() as decode:
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        for _ in range(15):
            time.sleep(0.1)
            prefill.backend.send(99, [0], 0, 0, 4)  # nobody's room: computed all the same
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([0], 4)
        assert decode.notice().state is TransferState.ARRIVED


def address_of(server: Node) -> tuple[str, int]:
    host, port = server.backend.address.split(":")
    return host, int(port)


def test_strangers_neither_stay_nor_keep_others_away() -> None:
    with node(seed=1, max_connections=4) as prefill, node() as decode:
        strangers = [socket.create_connection(address_of(prefill)) for _ in range(20)]
        for stranger in strangers:
            stranger.sendall(b"H")
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([0], 4)
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        assert decode.notice().state is TransferState.ARRIVED
        assert (prefill.backend.n_connections or 0) <= 8
        for stranger in strangers:
            stranger.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(100):
                    pass
            stranger.close()


@pytest.mark.parametrize("secret", [None, "correct horse battery"])
def test_a_handshake_byte_by_byte_is_cut_in_time(secret: str | None) -> None:
    first = Kind.HELLO if secret is None else Kind.CHALLENGE
    header = iter([b"H", b"C", b"K", b"V", bytes([first])])
    with node(secret=secret) as prefill, socket.create_connection(address_of(prefill)) as stranger:
        stranger.settimeout(0.05)
        deadline = time.monotonic() + WAIT_S
        is_open = True
        while is_open:
            assert time.monotonic() < deadline, "a stranger was never cut off"
            try:
                stranger.send(next(header, b"\0"))
                is_open = stranger.recv(1000) != b""
            except TimeoutError:
                pass
            except ConnectionError:
                is_open = False


def test_a_hello_of_deep_json_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with node() as prefill, socket.create_connection(address_of(prefill)) as sock:
        peer = Connection(sock, "prefill", Patience(WAIT_S), float("inf"))
        peer.send(Frame(Kind.HELLO, ROOM, nbytes=len(DEEP), checksum=checksum_of([DEEP])), [DEEP])
        with pytest.raises(ConnectionError):
            peer.receive()
    (record,) = caplog.records
    assert "sent no JSON in HELLO" in record.message
    assert record.exc_info is None


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_listener_outlives_a_moment_without_file_descriptors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.ExitStack() as stack:
        prefill = stack.enter_context(node(seed=1))
        clients = [socket.socket() for _ in range(3)]
        assert prefill.backend.fault == ""
        with no_file_descriptors():
            for client in clients:
                client.connect(address_of(prefill))
            wait_for(lambda: "Too many open files" in prefill.backend.fault)
            time.sleep(0.5)
        for client in clients:
            client.close()
        wait_for(lambda: not prefill.backend.fault)
        decode = stack.enter_context(node())
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([0], 4)
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        assert decode.notice().state is TransferState.ARRIVED
    logged = [record for record in caplog.records if "can be accepted" in record.message]
    assert len(logged) == 1, "told once, not at every try"


def test_a_moment_without_threads_costs_the_rooms_that_come_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``Thread.start`` fails as it does then; the limit itself does not bind the superuser."""
    start = threading.Thread.start

    def cannot(thread: threading.Thread) -> None:
        if thread.name.startswith("kv-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with node(seed=1) as prefill, node() as decode:
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([0], 4)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", cannot)
            with pytest.raises(TransferError, match="no thread can be started"):
                decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
            with socket.create_connection(address_of(prefill)) as caller:
                assert caller.recv(1) == b""
            wait_for(lambda: "no thread can be started" in prefill.backend.fault)
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        assert decode.notice().state is TransferState.ARRIVED


def test_a_listener_that_is_dead_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeerTransfer, "_accept", lambda _: None)
    with node() as prefill:
        wait_for(lambda: prefill.backend.fault == "the listener has ended")


def test_close_waits_for_a_receiver_that_was_let_in_at_the_last_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread of a caller starts while the backend closes; when that is done, it has ended."""
    start, serve, is_let_in = PeerTransfer._start, PeerTransfer._serve, threading.Event()

    def slowly(self: PeerTransfer, work: Callable[[], None], name: str) -> threading.Thread:
        if name.startswith("kv-send"):
            is_let_in.set()
            assert self._closing.wait(WAIT_S)
            time.sleep(0.1)
        return start(self, work, name)

    def lately(self: PeerTransfer, caller: Connection) -> None:
        time.sleep(0.1)
        serve(self, caller)

    monkeypatch.setattr(PeerTransfer, "_start", slowly)
    monkeypatch.setattr(PeerTransfer, "_serve", lately)
    with node() as prefill, socket.create_connection(address_of(prefill)):
        assert is_let_in.wait(WAIT_S)
        prefill.backend.close()
        assert not [t.name for t in threading.enumerate() if t.name.startswith("kv-")]
