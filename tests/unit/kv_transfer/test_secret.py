"""A shared secret: who does not know it gets no KV and gives none, and it is never seen."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hicache_core.disaggregation.roles import RoleSettings
from hicache_core.errors import ConfigError, PeerRefused, TransferError
from hicache_core.kv_transfer.base import Notice, TransferContext, TransferState
from hicache_core.kv_transfer.peers import PeerConfig
from hicache_core.kv_transfer.secret import SharedSecret
from hicache_core.kv_transfer.tcp import TcpTransfer
from hicache_core.kv_transfer.wire import Connection, Kind, Patience
from hicache_core.plugin.manager import transfer_settings
from hicache_core.testing.transfer_kit import ROOM, WAIT_S, Node, memory_of, spec_of

SECRET = "correct horse battery staple"
OTHER = "incorrect horse battery staple"


@contextmanager
def pair(prefill: str | None, decode: str | None) -> Iterator[tuple[Node, Node]]:
    """Two nodes, each with its secret."""
    nodes = []
    for seed, secret in ((1, prefill), (None, decode)):
        memory, news = memory_of(spec_of(), seed), threading.Event()
        given = {} if secret is None else {"secret": secret}
        config = PeerConfig(ping_s=0.05, idle_timeout_s=1.0, **given)
        backend = TcpTransfer(config, TransferContext(memory, on_notice=news.set))
        backend.open()
        nodes.append(Node(memory, backend, news))
    try:
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.backend.close()


def fetched(prefill: Node, decode: Node) -> Notice:
    """The decode node's notice of two pages."""
    prefill.backend.offer(ROOM, 8, WAIT_S)
    prefill.send_all([0, 1], 8)
    decode.backend.receive(ROOM, [prefill.backend.address], [2, 3], (0, 8), WAIT_S)
    return decode.notice()


@pytest.mark.parametrize("secret", [SECRET, None])
def test_nodes_with_the_same_secret_exchange_kv(secret: str | None) -> None:
    with pair(secret, secret) as (prefill, decode):
        assert fetched(prefill, decode).state is TransferState.ARRIVED
        assert decode.rows([2, 3], 0, 8) == prefill.rows([0, 1], 0, 8)


@pytest.mark.parametrize(
    ("prefill_secret", "decode_secret", "said"),
    [
        (SECRET, OTHER, "the two nodes have different shared secrets"),
        (SECRET, None, "this prefill node wants a shared secret"),
        (None, SECRET, "does not prove that it knows the shared secret"),
    ],
)
def test_a_node_without_the_secret_is_refused(
    prefill_secret: str | None, decode_secret: str | None, said: str
) -> None:
    with pair(prefill_secret, decode_secret) as (prefill, decode):
        notice = fetched(prefill, decode)
        assert notice.state is TransferState.FAILED
        assert notice.error_kind == "PeerRefused"
        assert said in notice.error
        assert "--disaggregation-secret" in notice.error
        assert "horse" not in notice.error
        assert decode.rows([2, 3], 0, 8) == [
            bytes(len(rows)) for rows in prefill.rows([0, 1], 0, 8)
        ]


@contextmanager
def talking(secret: str) -> Iterator[tuple[Connection, list[PeerRefused]]]:
    """A connection to somebody who asks to be convinced, and what they were not convinced by."""
    near, far = socket.socketpair()
    errors: list[PeerRefused] = []
    stranger = Connection(near, "decode node", Patience(WAIT_S), float("inf"))
    asker = Connection(far, "prefill node", Patience(WAIT_S), float("inf"))

    def ask() -> None:
        try:
            SharedSecret(secret).prove_to(asker)
        except PeerRefused as error:
            errors.append(error)
        asker.shutdown()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield stranger, errors
    finally:
        stranger.shutdown()
        thread.join()
        stranger.close()
        asker.close()


def test_the_own_words_sent_back_prove_nothing() -> None:
    with talking(SECRET) as (stranger, errors):
        challenge = stranger.receive_json(Kind.CHALLENGE)[1]
        stranger.send_json(Kind.CHALLENGE, 0, challenge)
        proof = stranger.receive_json(Kind.PROOF)[1]
        stranger.send_json(Kind.PROOF, 0, proof)
        with pytest.raises(TransferError, match="closed"):
            stranger.receive()
        assert "another shared secret" in str(errors[0])


@pytest.mark.parametrize("word", [None, 7, "", "ab", "G" * 64, "é" * 64])
def test_words_without_sense_are_refused(word: object) -> None:
    with talking(SECRET) as (stranger, errors):
        stranger.receive_json(Kind.CHALLENGE)
        stranger.send_json(Kind.CHALLENGE, 0, {"nonce": word})
        with pytest.raises(TransferError, match="closed"):
            stranger.receive()
        assert "a malformed nonce was sent" in str(errors[0])


def test_two_proofs_of_one_secret_differ() -> None:
    proofs = []
    for _ in range(2):
        with talking(SECRET) as (stranger, _):
            stranger.receive_json(Kind.CHALLENGE)
            stranger.send_json(Kind.CHALLENGE, 0, {"nonce": "0" * 64})
            proofs.append(stranger.receive_json(Kind.PROOF)[1]["proof"])
    assert proofs[0] != proofs[1]


def test_the_secret_is_shown_nowhere() -> None:
    settings = RoleSettings("decode", "tcp", {"secret": SECRET})
    config = transfer_settings(TcpTransfer, {"secret": SECRET})
    assert "horse" not in f"{settings!r} {config!r} {config} {config.model_dump()}"
    with pytest.raises(ConfigError, match=r"tcp\.secret.*16") as short:
        transfer_settings(TcpTransfer, {"secret": "hunter2"})
    assert "hunter2" not in str(short.value)
