"""CountedTransfer: a transfer backend that counts rows, bytes and outcomes for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hicache_core.disaggregation.wrapper import TransferWrapper
from hicache_core.histogram import Distribution
from hicache_core.kv.spec import GroupKind
from hicache_core.kv_transfer.base import (
    KvTransferBackend,
    Notice,
    TransferState,
    UnitRows,
)
from hicache_core.kv_transfer.page_memory import PageMemory
from hicache_core.observe.snapshot import TransferStatus

SENT, RECEIVED = "sent", "received"
BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class CountedTransfer(TransferWrapper):
    """Passes all calls on to ``inner`` and counts its notices.

    Any thread may call ``status``; its numbers may differ by calls that are just running.
    """

    name = "counted"

    def __init__(self, inner: KvTransferBackend) -> None:
        """Counts nothing yet."""
        super().__init__(inner)
        memory = self.context.memory
        self._row_nbytes, self._state_nbytes = _nbytes_by_layer(memory), 0
        for group, its in zip(memory.spec.groups, memory.groups, strict=True):
            if group.kind is GroupKind.WINDOW:
                self._row_nbytes += _nbytes_by_layer(its)
            else:
                self._state_nbytes += sum(_nbytes_by_layer(its))
        self._n_states: Counter[str] = Counter()
        self._under_way: dict[str, set[int]] = {SENT: set(), RECEIVED: set()}
        self._nbytes: Counter[str] = Counter({SENT: 0, RECEIVED: 0})
        self._outcomes: Counter[str] = Counter()
        self._seconds = Distribution(BOUNDS_S)

    def status(self) -> TransferStatus:
        """The counts so far."""
        nbytes = dict(self._nbytes)
        return TransferStatus(
            backend=self._inner.name,
            nbytes=nbytes,
            rows={direction: self._rows_of(direction, n) for direction, n in nbytes.items()},
            outcomes=dict(self._outcomes),
            seconds=self._seconds.histogram(),
            in_flight={direction: len(rooms) for direction, rooms in self._under_way.items()},
            connections=self._inner.n_connections,
        )

    def _rows_of(self, direction: str, nbytes: int) -> int:
        """Rows of so many bytes, states aside; where those of the layers differ, of mean length."""
        nbytes -= self._n_states[direction] * self._state_nbytes
        return nbytes * len(self._row_nbytes) // max(1, sum(self._row_nbytes))

    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        # docstring inherited
        super().offer(room, n_tokens, timeout_s)
        self._under_way[SENT].add(room)

    def receive(
        self,
        room: int,
        addresses: Sequence[str],
        pages: Sequence[int],
        tokens: tuple[int, int],
        timeout_s: float,
        groups: Sequence[UnitRows] = (),
    ) -> None:
        # docstring inherited
        super().receive(room, addresses, pages, tokens, timeout_s, groups)
        self._under_way[RECEIVED].add(room)

    def poll(self) -> list[Notice]:
        # docstring inherited
        notices = super().poll()
        for notice in notices:
            self._count(notice)
        return notices

    def _count(self, notice: Notice) -> None:
        is_sent = notice.state is TransferState.SENT or (
            notice.state is TransferState.FAILED and notice.room in self._under_way[SENT]
        )
        direction = SENT if is_sent else RECEIVED
        self._under_way[direction].discard(notice.room)
        self._nbytes[direction] += notice.nbytes
        self._n_states[direction] += notice.state is not TransferState.FAILED
        self._outcomes[notice.state.value] += 1
        self._seconds.add(notice.elapsed_s)


def _nbytes_by_layer(memory: PageMemory) -> list[int]:
    """Bytes of a row in each layer that has any."""
    layers = range(memory.spec.num_layers)
    return [n for n in (memory.nbytes(1, memory.heads, layer) for layer in layers) if n]
