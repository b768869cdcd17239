"""Counting changes nothing about a transfer: the kit's rules, and the numbers."""

from __future__ import annotations

from hicache_core.disaggregation.counted import CountedTransfer
from hicache_core.kv_transfer.base import KvTransferBackend, TransferContext, TransferState
from hicache_core.kv_transfer.peers import PeerConfig
from hicache_core.kv_transfer.tcp import TcpTransfer
from hicache_core.observe.snapshot import TransferStatus
from hicache_core.testing.transfer_kit import (
    LAYERS_DIFFER,
    N_LAYERS,
    ROOM,
    WAIT_S,
    Node,
    TransferKit,
    memory_of,
)


def status_of(node: Node) -> TransferStatus:
    """What a node counted."""
    assert isinstance(node.backend, CountedTransfer)
    return node.backend.status()


class TestCounted(TransferKit):
    def make(self, context: TransferContext) -> KvTransferBackend:
        return CountedTransfer(TcpTransfer(PeerConfig(ping_s=0.05, idle_timeout_s=1.0), context))

    def test_both_sides_count_bytes_rows_and_ends(self) -> None:
        prefill, decode = self.pair()
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1, 2], (6, 12), WAIT_S)
        assert status_of(decode).in_flight == {"sent": 0, "received": 1}
        prefill.backend.offer(ROOM, 12, WAIT_S)
        prefill.send_all([4, 5, 6], 12)
        assert decode.notice().state is TransferState.ARRIVED
        assert prefill.notice().state is TransferState.SENT
        nbytes, rows = 6 * prefill.memory.spec.token_nbytes, 6 * N_LAYERS
        sent, received = status_of(prefill), status_of(decode)
        assert (sent.backend, received.backend) == ("tcp", "tcp")
        assert sent.nbytes == {"sent": nbytes, "received": 0}
        assert received.nbytes == {"sent": 0, "received": nbytes}
        assert sent.rows == {"sent": rows, "received": 0}
        assert received.rows == {"sent": 0, "received": rows}
        assert (sent.outcomes, received.outcomes) == ({"sent": 1}, {"arrived": 1})
        assert (sent.seconds.n, received.seconds.n) == (1, 1)
        assert sent.in_flight == received.in_flight == {"sent": 0, "received": 0}

    def test_rows_are_counted_where_layers_differ(self) -> None:
        """A row is one token of one layer; a layer that has nothing has no rows."""
        prefill = self.node(memory_of(LAYERS_DIFFER, seed=1))
        decode = self.node(memory_of(LAYERS_DIFFER, None))
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1], (0, 6), WAIT_S)
        prefill.backend.offer(ROOM, 6, WAIT_S)
        prefill.send_all([4, 5], 6)
        assert decode.notice().state is TransferState.ARRIVED
        assert status_of(decode).rows == {"sent": 0, "received": 6 * 2}

    def test_a_failure_is_counted_on_the_side_where_it_was_under_way(self) -> None:
        prefill, decode = self.pair()
        prefill.backend.offer(ROOM, 4, WAIT_S)
        assert status_of(prefill).in_flight["sent"] == 1
        prefill.backend.cancel(ROOM, "no more")
        assert prefill.notice().state is TransferState.FAILED
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        assert decode.notice().state is TransferState.FAILED
        for node in (prefill, decode):
            assert status_of(node).outcomes == {"failed": 1}
            assert status_of(node).in_flight == {"sent": 0, "received": 0}

    def test_connections_are_seen_while_they_are_open(self) -> None:
        prefill, decode = self.pair()
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        for node in (prefill, decode):
            while not status_of(node).connections:
                node.news.wait(0.01)
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([1], 4)
        decode.notice()
        prefill.notice()
        for node in (prefill, decode):
            while status_of(node).connections:
                node.news.wait(0.01)
                node.news.clear()
