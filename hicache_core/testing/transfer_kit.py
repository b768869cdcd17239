"""TransferKit: the rules of a transfer backend as a pytest class; plugins run it on their own.

::

    class TestTcp(TransferKit):
        def make(self, context: TransferContext) -> KvTransferBackend:
            return TcpTransfer(PeerConfig(ping_s=0.05), context)
"""

from __future__ import annotations

import mmap
import random
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from hicache_core.errors import TransferError
from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec
from hicache_core.kv_transfer.base import (
    KvTransferBackend,
    Notice,
    TransferContext,
    TransferState,
    UnitRows,
)
from hicache_core.kv_transfer.page_memory import PageMemory

PAGE_SIZE = 4
N_PAGES = 16
N_LAYERS = 3
N_HEADS = 8
WAIT_S = 30.0
ROOM = 7


def spec_of(heads: tuple[int, int] = (0, N_HEADS), fingerprint: str = "m1") -> KVSpec:
    """A shard of a small model: keys and values of different width."""
    whole = KVSpec.mha(
        num_layers=N_LAYERS,
        num_heads=N_HEADS,
        head_dim=6,
        v_head_dim=4,
        dtype="float16",
        fingerprint=fingerprint,
    )
    return whole.shard(heads=heads)


LAYERS_DIFFER = KVSpec(
    (
        Component("k", (N_HEADS, 3), "float16", (0,)),
        Component("k_1", (N_HEADS // 2, 2), "int8", (2,)),
        Component("indexer_k", (1, 5), "int8", (0, 2)),
    ),
    N_LAYERS,
    "m1",
    (0, N_LAYERS),
    (0, N_HEADS, N_HEADS),
)
"""A small model whose last layer has half as many heads, and whose second layer has nothing."""


def _part(*components: Component, groups: tuple[Group, ...] = ()) -> KVSpec:
    return KVSpec(components, N_LAYERS, "m1", (0, N_LAYERS), (0, N_HEADS, N_HEADS), groups)


_STATE = _part(Component("conv_0", (3, 5), "float32", (2,)))
GROUPED = _part(
    Component("k", (N_HEADS, 4), "bfloat16", (0,)),
    groups=(
        Group("swa", GroupKind.WINDOW, _part(Component("k", (N_HEADS, 2), "float32", (1,))), 6),
        Group("mamba", GroupKind.STATE, replace(_STATE, heads=(0, 1, 1))),
    ),
)
"""A small model whose first layer keeps all tokens, its second a window and its third a state."""


def memory_of(spec: KVSpec, seed: int | None, page_size: int = PAGE_SIZE) -> PageMemory:
    """Page memory in mapped regions, which RDMA can register.

    Args:
        spec: shapes of the KV.
        seed: of the random bytes in it; None for zeros.
        page_size: tokens in a page.
    """
    regions = []
    source = random.Random(seed)
    for component in spec.components:
        nbytes = component.row_nbytes * page_size * N_PAGES
        layers = []
        for _ in spec.layers_of(component):
            view = memoryview(mmap.mmap(-1, nbytes))
            if seed is not None:
                view[:] = source.randbytes(nbytes)
            layers.append(view)
        regions.append(layers)
    groups = [memory_of(group.spec, seed, group.page_size(page_size)) for group in spec.groups]
    return PageMemory(spec, page_size, N_PAGES, regions, groups)


@dataclass(frozen=True)
class HeldMemory(PageMemory):
    """Page memory that holds up whoever else asks for rows, when it has them and goes to use them.

    Attributes:
        asked: somebody has asked.
        go_on: who has asked may go on.
    """

    asked: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    owner: threading.Thread = field(default_factory=threading.current_thread)

    def segments(
        self, layer: int, pages: Sequence[int], start: int, stop: int, heads: tuple[int, int]
    ) -> list[memoryview]:
        # docstring inherited; the answer comes late, to any thread but the owner
        found = PageMemory.segments(self, layer, pages, start, stop, heads)
        if threading.current_thread() is not self.owner:
            self.asked.set()
            self.go_on.wait(WAIT_S)
        return found


@dataclass
class Node:
    """One rank: its memory, its backend, and the notices that it has had."""

    memory: PageMemory
    backend: KvTransferBackend
    news: threading.Event
    notices: dict[int, Notice] = field(default_factory=dict)

    def notice(self, room: int = ROOM) -> Notice:
        """Waits for the one notice of a room."""
        deadline = time.monotonic() + WAIT_S
        while room not in self.notices:
            self.news.clear()
            for notice in self.backend.poll():
                assert notice.room not in self.notices, "a second notice"
                self.notices[notice.room] = notice
            if room not in self.notices:
                assert time.monotonic() < deadline, f"no notice of room {room}"
                self.news.wait(0.05)
        return self.notices[room]

    def rows(
        self, pages: Sequence[int], start: int, stop: int, heads: tuple[int, int] | None = None
    ) -> list[bytes]:
        """The bytes of rows, one item for each layer.

        Args:
            pages: pages of the request, in order.
            start: first token.
            stop: token after the last one.
            heads: first head and the one after the last; None for all heads of the node.
        """
        heads = heads or self.memory.heads
        return [
            b"".join(self.memory.segments(layer, pages, start, stop, heads))
            for layer in range(N_LAYERS)
        ]

    def send_all(self, pages: Sequence[int], n_tokens: int) -> None:
        """Says of every layer that it is final, then finishes."""
        for layer in range(N_LAYERS):
            self.backend.send(ROOM, pages, layer, 0, n_tokens)
        self.backend.finish(ROOM, b"note")


class TransferKit:
    """Rules; a subclass says how its backend is made."""

    @abstractmethod
    def make(self, context: TransferContext) -> KvTransferBackend:
        """A backend, not open yet, with short limits."""

    @pytest.fixture(autouse=True)
    def _nodes(self) -> Iterator[None]:
        self._made: list[Node] = []
        yield
        for node in self._made:
            node.backend.close()
        assert not [t.name for t in threading.enumerate() if t.name.startswith("kv-")]

    def node(
        self,
        memory: PageMemory | None = None,
        *,
        seed: int | None = None,
        ranks: tuple[int, int] = (0, 1),
    ) -> Node:
        """Makes and opens a backend; it is closed after the test.

        Args:
            memory: its page memory; None for a new one.
            seed: of the random bytes in a new memory; None for zeros.
            ranks: number of this rank, and of ranks.
        """
        memory = memory or memory_of(spec_of(), seed)
        news = threading.Event()
        backend = self.make(TransferContext(memory, *ranks, news.set))
        backend.open()
        node = Node(memory, backend, news)
        self._made.append(node)
        return node

    def pair(self) -> tuple[Node, Node]:
        """A prefill node with random rows and an empty decode node."""
        return self.node(seed=1), self.node()

    @pytest.mark.parametrize("first", ["prefill", "decode"])
    def test_rows_arrive_layer_by_layer_whoever_comes_first(self, first: str) -> None:
        prefill, decode = self.pair()
        pages, others = [3, 4, 9, 1], [0, 7, 8, 2]

        def offer() -> None:
            prefill.backend.offer(ROOM, 14, WAIT_S)
            prefill.send_all(pages, 14)

        if first == "prefill":
            offer()
        decode.backend.receive(ROOM, [prefill.backend.address], others, (0, 14), WAIT_S)
        if first == "decode":
            offer()
        arrived = decode.notice()
        assert (arrived.state, arrived.note) == (TransferState.ARRIVED, b"note")
        assert decode.rows(others, 0, 14) == prefill.rows(pages, 0, 14)
        assert arrived.nbytes == 14 * prefill.memory.spec.token_nbytes
        assert prefill.notice().state is TransferState.SENT

    def test_the_rows_beside_a_tail_stay_as_they_were(self) -> None:
        prefill, decode = self.pair()
        decode.backend.receive(ROOM, [prefill.backend.address], [5, 6], (0, 6), WAIT_S)
        prefill.backend.offer(ROOM, 6, WAIT_S)
        prefill.send_all([1, 2], 6)
        assert decode.notice().state is TransferState.ARRIVED
        everything = decode.rows(range(N_PAGES), 0, N_PAGES * PAGE_SIZE)
        zeros = [bytes(len(layer)) for layer in everything]
        for layer in range(N_LAYERS):
            for segment in decode.memory.segments(layer, [5, 6], 0, 6, decode.memory.heads):
                segment[:] = bytes(segment.nbytes)
        assert decode.rows(range(N_PAGES), 0, N_PAGES * PAGE_SIZE) == zeros

    def test_a_receiver_with_a_prefix_is_sent_what_is_behind_it(self) -> None:
        prefill, decode = self.pair()
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1, 2], (6, 12), WAIT_S)
        prefill.backend.offer(ROOM, 12, WAIT_S)
        for start, stop in [(0, 4), (4, 9), (9, 12)]:
            for layer in range(N_LAYERS):
                prefill.backend.send(ROOM, [4, 5, 6], layer, start, stop)
        prefill.backend.finish(ROOM, b"")
        arrived = decode.notice()
        assert arrived.state is TransferState.ARRIVED
        assert arrived.nbytes == 6 * prefill.memory.spec.token_nbytes
        assert decode.rows([0, 1, 2], 6, 12) == prefill.rows([4, 5, 6], 6, 12)
        assert decode.rows([0, 1, 2], 0, 6) == [bytes(len(r)) for r in prefill.rows([4, 5], 0, 6)]

    def test_many_rooms_at_once_do_not_mix(self) -> None:
        prefill, decode = self.pair()
        for room in range(8):
            decode.backend.receive(
                room, [prefill.backend.address], [room * 2, room * 2 + 1], (0, 8), WAIT_S
            )
        for room in reversed(range(8)):
            prefill.backend.offer(room, 8, WAIT_S)
        for layer in range(N_LAYERS):
            for room in range(8):
                prefill.backend.send(room, [15 - room * 2, 14 - room * 2], layer, 0, 8)
        for room in range(8):
            prefill.backend.finish(room, bytes([room]))
        for room in range(8):
            arrived = decode.notice(room)
            assert (arrived.state, arrived.note) == (TransferState.ARRIVED, bytes([room]))
            theirs = prefill.rows([15 - room * 2, 14 - room * 2], 0, 8)
            assert decode.rows([room * 2, room * 2 + 1], 0, 8) == theirs

    @pytest.mark.parametrize(
        ("n_senders", "n_receivers", "introduced"),
        [(1, 2, False), (2, 1, False), (2, 1, True), (4, 2, True), (2, 4, True), (8, 1, False)],
    )
    def test_prefill_and_decode_may_be_divided_differently(
        self, n_senders: int, n_receivers: int, introduced: bool
    ) -> None:
        """A receiver knows all senders, or one that was introduced to the others.

        Args:
            n_senders: ranks of the prefill side.
            n_receivers: ranks of the decode side.
            introduced: whether the senders know each other, and a receiver one of them.
        """
        whole = memory_of(spec_of(), seed=5)
        prefills = [self._shard(whole, rank, n_senders) for rank in range(n_senders)]
        decodes = [self._shard(None, rank, n_receivers) for rank in range(n_receivers)]
        addresses = [prefill.backend.address for prefill in prefills]
        if introduced:
            for prefill in prefills:
                prefill.backend.introduce(addresses)
            addresses = addresses[:1]
        for decode in decodes:
            decode.backend.receive(ROOM, addresses, [2, 3, 0], (0, 10), WAIT_S)
        for prefill in prefills:
            prefill.backend.offer(ROOM, 10, WAIT_S)
            prefill.send_all([1, 2, 3], 10)
        for decode in decodes:
            arrived = decode.notice()
            assert arrived.state is TransferState.ARRIVED, arrived.error
            heads = decode.memory.heads
            theirs = [b"".join(whole.segments(n, [1, 2, 3], 0, 10, heads)) for n in range(N_LAYERS)]
            assert decode.rows([2, 3, 0], 0, 10) == theirs
        for prefill in prefills:
            assert prefill.notice().state is TransferState.SENT

    @pytest.mark.parametrize(("n_senders", "n_receivers"), [(1, 1), (2, 1), (1, 2), (4, 4)])
    def test_layers_may_differ_and_one_may_have_nothing(
        self, n_senders: int, n_receivers: int
    ) -> None:
        whole = memory_of(LAYERS_DIFFER, seed=5)
        prefills = [self._shard(whole, rank, n_senders) for rank in range(n_senders)]
        decodes = [
            self._shard(None, rank, n_receivers, LAYERS_DIFFER) for rank in range(n_receivers)
        ]
        addresses = [prefill.backend.address for prefill in prefills]
        for decode in decodes:
            decode.backend.receive(ROOM, addresses, [2, 3, 0], (0, 10), WAIT_S)
        for prefill in prefills:
            prefill.backend.offer(ROOM, 10, WAIT_S)
            prefill.send_all([1, 2, 3], 10)
        for decode in decodes:
            arrived = decode.notice()
            assert arrived.state is TransferState.ARRIVED, arrived.error
            heads = decode.memory.heads
            theirs = [b"".join(whole.segments(n, [1, 2, 3], 0, 10, heads)) for n in range(N_LAYERS)]
            assert decode.rows([2, 3, 0], 0, 10) == theirs
            if n_senders == 1:  # from several, what all heads share comes from each
                assert arrived.nbytes == 10 * decode.memory.spec.token_nbytes
        for prefill in prefills:
            assert prefill.notice().state is TransferState.SENT

    def test_windows_and_states_come_with_the_full_pages(self) -> None:
        prefill = self.node(memory_of(GROUPED, seed=3))
        decode = self.node(memory_of(GROUPED, None))
        if not decode.backend.moves_groups:
            pytest.skip("this backend moves full pages only (moves_groups)")
        n, window, pages = 10, (5, 10), [1, 2, 3]
        wanted = [UnitRows([0, 3, 2], window), UnitRows([2], (0, 1))]
        address = prefill.backend.address
        decode.backend.receive(ROOM, [address], [2, 3, 0], (4, n), WAIT_S, wanted)
        prefill.backend.offer(ROOM, n, WAIT_S)
        prefill.backend.send(ROOM, pages, 0, 0, n)
        prefill.backend.send(ROOM, pages, 1, *window, 0)
        prefill.backend.send(ROOM, [1], 2, 0, 1, 1)
        for layer in (1, 2):
            prefill.backend.send(ROOM, pages, layer, 0, n)
        prefill.backend.finish(ROOM, b"note")
        arrived = decode.notice()
        assert arrived.state is TransferState.ARRIVED, arrived.error
        assert prefill.notice().state is TransferState.SENT
        for group, layer, theirs, rows in (
            (None, 0, pages, UnitRows([2, 3, 0], (4, n))),
            (0, 1, pages, wanted[0]),
            (1, 2, [1], wanted[1]),
        ):
            number = decode.memory.number(layer, group)
            (there, at), (here, _) = prefill.memory.part(number), decode.memory.part(number)
            sent = b"".join(there.segments(at, theirs, *rows.tokens, there.heads))
            assert b"".join(here.segments(at, rows.pages, *rows.tokens, here.heads)) == sent
            assert any(sent)

    def test_a_group_that_does_not_come_fails_the_room(self) -> None:
        prefill = self.node(memory_of(GROUPED, seed=3))
        decode = self.node(memory_of(GROUPED, None))
        if not decode.backend.moves_groups:
            pytest.skip("this backend moves full pages only (moves_groups)")
        wanted = [UnitRows([0, 1], (3, 8)), UnitRows([2], (0, 1))]
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1], (0, 8), WAIT_S, wanted)
        prefill.backend.offer(ROOM, 8, WAIT_S)
        prefill.send_all([0, 1], 8)
        assert decode.notice().state is TransferState.FAILED

    def test_a_node_without_the_groups_is_refused(self) -> None:
        prefill, decode = self.node(memory_of(GROUPED, seed=3)), self.node()
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1], (0, 8), WAIT_S)
        assert decode.notice().error_kind == "PeerRefused"

    def _shard(
        self, whole: PageMemory | None, rank: int, n: int, spec: KVSpec | None = None
    ) -> Node:
        width = N_HEADS // n
        model = whole.spec if whole is not None else spec or spec_of()
        memory = memory_of(model.shard(heads=(rank * width, (rank + 1) * width)), None)
        if whole is not None:
            all_pages = range(N_PAGES)
            for layer in range(N_LAYERS):
                here = memory.segments(layer, all_pages, 0, N_PAGES * PAGE_SIZE, memory.heads)
                there = b"".join(
                    whole.segments(layer, all_pages, 0, N_PAGES * PAGE_SIZE, memory.heads)
                )
                for segment in here:
                    segment[:], there = there[: segment.nbytes], there[segment.nbytes :]
        return self.node(memory, ranks=(rank, n))

    def test_heads_that_nobody_has_are_an_error(self) -> None:
        prefill = self._shard(None, 0, 2)
        decode = self.node()
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        failed = decode.notice()
        assert failed.state is TransferState.FAILED
        assert "heads [(4, 8)] are on none of" in failed.error

    @pytest.mark.parametrize("difference", ["model_fingerprint", "page_size", "components"])
    def test_another_model_is_refused_by_name(self, difference: str) -> None:
        prefill = self.node(seed=1)
        spec = spec_of(fingerprint="m2" if difference == "model_fingerprint" else "m1")
        if difference == "components":
            spec = KVSpec.mha(
                num_layers=N_LAYERS, num_heads=8, head_dim=6, dtype="float32", fingerprint="m1"
            )
        decode = self.node(memory_of(spec, None, 8 if difference == "page_size" else PAGE_SIZE))
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        failed = decode.notice()
        assert (failed.state, failed.error_kind) == (TransferState.FAILED, "PeerRefused")
        assert f"{difference} is " in failed.error

    def test_a_prefill_node_that_is_not_there_fails_the_room(self) -> None:
        decode = self.node()
        gone = self.node()
        address = gone.backend.address
        gone.backend.close()
        decode.backend.receive(ROOM, [address], [0], (0, 4), WAIT_S)
        failed = decode.notice()
        assert failed.state is TransferState.FAILED
        assert address in failed.error

    def test_a_prefill_node_that_closes_in_the_middle_fails_the_room(self) -> None:
        prefill, decode = self.pair()
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1], (0, 8), WAIT_S)
        prefill.backend.offer(ROOM, 8, WAIT_S)
        prefill.backend.send(ROOM, [0, 1], 0, 0, 8)
        prefill.backend.close()
        assert prefill.notice().state is TransferState.FAILED
        assert decode.notice().state is TransferState.FAILED

    @pytest.mark.parametrize("side", ["prefill", "decode"])
    def test_a_side_that_gives_up_ends_the_other(self, side: str) -> None:
        prefill, decode = self.pair()
        prefill.backend.offer(ROOM, 8, WAIT_S)
        prefill.backend.send(ROOM, [0, 1], 0, 0, 8)
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1], (0, 8), WAIT_S)
        self._wait_for_bytes(decode)
        (prefill if side == "prefill" else decode).backend.cancel(ROOM, "client left")
        notices = {"prefill": prefill.notice(), "decode": decode.notice()}
        assert {notice.state for notice in notices.values()} == {TransferState.FAILED}
        assert notices[side].error == "client left"

    def _wait_for_bytes(self, node: Node) -> None:
        """Until the first layer is there."""
        deadline = time.monotonic() + WAIT_S
        zeros = bytes(len(node.rows([0, 1], 0, 8)[0]))
        while node.rows([0, 1], 0, 8)[0] == zeros:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    @pytest.mark.parametrize("side", ["prefill", "decode"])
    def test_a_room_ends_when_nobody_is_at_its_pages_any_more(self, side: str) -> None:
        """It is given up while a thread is about to read or write; others wait for its pages."""
        plain = memory_of(spec_of(), 1 if side == "prefill" else None)
        held = HeldMemory(plain.spec, plain.page_size, plain.n_pages, plain.regions)
        node = self.node(held)
        other = self.node(seed=1 if side == "decode" else None)
        prefill, decode = (node, other) if side == "prefill" else (other, node)
        try:
            prefill.backend.offer(ROOM, 8, WAIT_S)
            prefill.send_all([0, 1], 8)
            decode.backend.receive(ROOM, [prefill.backend.address], [0, 1], (0, 8), WAIT_S)
            assert held.asked.wait(WAIT_S)
            node.backend.cancel(ROOM, "client left")
            for _ in range(10):
                assert not node.backend.poll(), "its pages were given back too early"
                time.sleep(0.01)
        finally:
            held.go_on.set()
        assert node.notice().state is TransferState.FAILED
        rows = node.rows([0, 1], 0, 8)
        time.sleep(0.1)
        assert node.rows([0, 1], 0, 8) == rows

    def test_nobody_waits_longer_than_asked(self) -> None:
        prefill, decode = self.pair()
        prefill.backend.offer(1, 4, 0.2)
        decode.backend.receive(2, [prefill.backend.address], [0], (0, 4), 0.2)
        assert prefill.notice(1).state is TransferState.FAILED
        assert decode.notice(2).state is TransferState.FAILED

    def test_a_receiver_that_left_does_not_stop_others(self) -> None:
        prefill, decode = self.pair()
        decode.backend.receive(1, [prefill.backend.address], [0], (0, 4), WAIT_S)
        decode.backend.cancel(1, "client left")
        assert decode.notice(1).state is TransferState.FAILED
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([0], 4)
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        assert decode.notice().state is TransferState.ARRIVED

    def test_two_prompts_of_different_length_in_a_room_are_an_error(self) -> None:
        prefill, decode = self.pair()
        prefill.backend.offer(ROOM, 7, WAIT_S)
        prefill.send_all([0, 1], 7)
        decode.backend.receive(ROOM, [prefill.backend.address], [0, 1], (0, 8), WAIT_S)
        assert decode.notice().state is TransferState.FAILED
        assert prefill.notice().state is TransferState.FAILED

    def test_a_room_is_taken_once(self) -> None:
        prefill, _ = self.pair()
        prefill.backend.offer(ROOM, 4, WAIT_S)
        with pytest.raises(TransferError, match="room 7 is taken"):
            prefill.backend.offer(ROOM, 4, WAIT_S)

    def test_who_comes_after_the_end_is_told_at_once(self) -> None:
        prefill, decode = self.pair()
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.backend.cancel(ROOM, "client left")
        assert prefill.notice().error == "client left"
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        assert "room 7 has ended: client left" in decode.notice().error
