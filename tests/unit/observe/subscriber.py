"""A subscriber of KV events that keeps the index a router would keep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import msgpack
import zmq

from hicache_core.observe.events import KvEvents

PATIENCE_MS = 20_000
MEDIA = ("GPU", "CPU_PINNED", "EXTERNAL")


class Subscriber:
    """A SUB socket and, for what it missed, a DEALER socket."""

    def __init__(self, publisher: KvEvents, topic: str = "") -> None:
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.set_hwm(0)
        self._sub.subscribe(topic)
        self._sub.connect(publisher.endpoint)
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.set_hwm(0)
        if publisher.replay_endpoint:
            self._dealer.connect(publisher.replay_endpoint)
        self.index: dict[str, set[int]] = defaultdict(set)
        self.next_seq = 0  # until the first batch has come, whose number is the time
        self.topics: set[bytes] = set()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def join(self, publisher: KvEvents) -> None:
        """Waits until the publisher knows of this subscription."""
        while not self._sub.poll(20):
            publisher.cleared()

    def receive(self) -> tuple[int, list[Any]]:
        """The next live batch: its number and [ts, events, dp_rank]."""
        assert self._sub.poll(PATIENCE_MS), "no message came"
        topic, seq, payload = self._sub.recv_multipart()
        self.topics.add(topic)
        return int.from_bytes(seq, "big"), msgpack.unpackb(payload)

    def replayed(self, start_seq: int) -> Iterator[tuple[int, list[Any]]]:
        """What the publisher still has from ``start_seq`` on."""
        self._dealer.send_multipart((b"", start_seq.to_bytes(8, "big")))
        while True:
            assert self._dealer.poll(PATIENCE_MS), "no replay came"
            empty, topic, seq, payload = self._dealer.recv_multipart()
            assert empty == b""
            number = int.from_bytes(seq, "big", signed=True)
            if number == -1:
                assert (topic, payload) == (b"", b"")
                return
            self.topics.add(topic)
            yield number, msgpack.unpackb(payload)

    def follow_until(self, mark: int, *, lose: Iterable[int] = ()) -> None:
        """Applies batches until the hash ``mark`` is stored; live ones numbered in ``lose`` are not
        seen, and a gap is filled by a replay."""
        lost = set(lose)
        while not any(mark in hashes for hashes in self.index.values()):
            seq, batch = self.receive()
            if seq in lost or seq < self.next_seq:
                continue
            self.next_seq = self.next_seq or seq
            if seq > self.next_seq:
                for number, missed in self.replayed(self.next_seq):
                    self.apply(number, missed)
            else:
                self.apply(seq, batch)

    def apply(self, seq: int, batch: list[Any]) -> None:
        """Takes one batch into the index."""
        assert self.next_seq in (0, seq)
        self.next_seq = seq + 1
        _, events, _ = batch
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.index.clear()
                continue
            group = event.get("group_idx")
            medium = self.index[event["medium"] if group is None else f"{event['medium']} {group}"]
            if event["type"] == "BlockStored":
                medium.update(event["block_hashes"])
            else:
                assert event["type"] == "BlockRemoved"
                medium.difference_update(event["block_hashes"])
