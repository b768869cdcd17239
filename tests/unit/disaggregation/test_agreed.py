"""AgreedTransfer: whatever happens to a room on one rank, it ends alike and at once on all."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.disaggregation.agreed import AgreedTransfer
from hicache_core.errors import TransferError
from hicache_core.kv_transfer.base import (
    KvTransferBackend,
    Notice,
    TransferConfig,
    TransferContext,
    TransferState,
)
from hicache_core.ranks.base import RankGroup

N_POLLS = 16
WAIT_S = 30.0
WELL, BADLY, NEVER, AT_ONCE = "well", "badly", "never", "at once"


class Table:
    """Where the threads that play ranks meet."""

    def __init__(self, n_ranks: int) -> None:
        self.said: list[Any] = [None] * n_ranks
        self.barrier = threading.Barrier(n_ranks, timeout=WAIT_S)


class Thread(RankGroup):
    """One of them; an agreement covers three numbers."""

    window = 3

    def __init__(self, table: Table, rank: int) -> None:
        self._table = table
        self.rank, self.world_size = rank, len(table.said)

    def agree_min(self, values: Sequence[int]) -> list[int]:
        assert len(values) == self.window
        return [min(column) for column in zip(*self._all(list(values)), strict=True)]

    def gather(self, text: str) -> list[str]:
        return self._all(text)

    def _all(self, mine: Any) -> list[Any]:
        self._table.said[self.rank] = mine
        self._table.barrier.wait()
        said = list(self._table.said)
        self._table.barrier.wait()
        assert {type(one) for one in said} == {type(mine)}, "the ranks entered different calls"
        return said


@dataclass(frozen=True)
class Fate:
    """What becomes of a room on one rank, and at which poll; a cancelled one ends two later."""

    how: str
    at: int = 0


class Scripted(KvTransferBackend):
    """A backend of which the test says what happens."""

    name = "scripted"

    def __init__(self, rank: int, fates: Sequence[Fate]) -> None:
        super().__init__(TransferConfig(), TransferContext(cast(Any, None), rank))
        self.fates = dict(enumerate(fates))
        self.told: list[str] = []
        self.ended: dict[int, int] = {}  # the poll at which each room ended
        self._n_polls = 0
        self._note = b"note of %d" % rank

    def open(self) -> None:
        pass

    def close(self, timeout_s: float = 5.0) -> None:
        pass

    @property
    def address(self) -> str:
        return f"host:{self.context.rank}"

    def introduce(self, addresses: Sequence[str]) -> None:
        self.told = list(addresses)

    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        if self.fates[room].how == AT_ONCE:
            self.ended[room] = self._n_polls
            raise TransferError("not here")

    def send(self, room: int, pages: Sequence[int], layer: int, start: int, stop: int) -> None:
        pass

    def finish(self, room: int, note: bytes) -> None:
        pass

    def receive(
        self,
        room: int,
        addresses: Sequence[str],
        pages: Sequence[int],
        tokens: tuple[int, int],
        timeout_s: float,
    ) -> None:
        self.offer(room, 1, timeout_s)

    def cancel(self, room: int, reason: str) -> None:
        if room not in self.ended and self.fates[room].how in (WELL, NEVER):
            self.fates[room] = Fate(reason, self._n_polls + 2)

    def poll(self) -> list[Notice]:
        now, self._n_polls = self._n_polls, self._n_polls + 1
        notices = []
        for room, fate in self.fates.items():
            if room not in self.ended and fate.how != NEVER and fate.at <= now:
                self.ended[room] = now
                failed = fate.how != WELL
                notices.append(
                    Notice(room, TransferState.FAILED, fate.how, "TransferError", nbytes=1)
                    if failed
                    else Notice(room, TransferState.ARRIVED, note=self._note, nbytes=1)
                )
        return notices


def play(fates: Sequence[Sequence[Fate]]) -> tuple[list[Scripted], list[list[list[Notice]]]]:
    """Begins every room on every rank, and polls; the backends, and each rank's notices by poll."""
    table = Table(len(fates))
    inner = [Scripted(rank, mine) for rank, mine in enumerate(fates)]

    def run(rank: int) -> list[list[Notice]]:
        transfer = AgreedTransfer(inner[rank], Thread(table, rank))
        transfer.open()
        for room in range(len(fates[rank])):
            transfer.receive(room, ["a:1"], [0], (0, 1), 1.0)
            with pytest.raises(TransferError, match=f"room {room} is taken"):
                transfer.receive(room, ["a:1"], [0], (0, 1), 1.0)
        return [transfer.poll() for _ in range(N_POLLS)]

    with ThreadPoolExecutor(len(fates)) as ranks:
        return inner, list(ranks.map(run, range(len(fates))))


ENDINGS = st.builds(Fate, st.sampled_from([WELL, WELL, BADLY, NEVER, AT_ONCE]), st.integers(0, 5))
WORLDS = st.tuples(st.integers(2, 3), st.integers(1, 4)).flatmap(
    lambda size: st.lists(
        st.lists(ENDINGS, min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
    )
)


@settings(deadline=None, max_examples=60)
@given(fates=WORLDS)
def test_all_ranks_hear_the_same_at_the_same_poll(fates: list[list[Fate]]) -> None:
    inner, heard = play(fates)
    assert all(notices == heard[0] for notices in heard)
    told = {notice.room: (poll, notice) for poll, all_ in enumerate(heard[0]) for notice in all_}
    assert sum(len(notices) for notices in heard[0]) == len(told), "a second notice"
    for room in range(len(fates[0])):
        endings = {mine[room].how for mine in fates}
        if endings in ({NEVER}, {NEVER, WELL}):
            assert room not in told
            continue
        poll, notice = told[room]
        assert (notice.state is TransferState.ARRIVED) == (endings == {WELL})
        assert poll == max(backend.ended[room] for backend in inner), "before its pages were free"


def test_the_notice_is_made_of_those_of_all_ranks() -> None:
    inner, heard = play([[Fate(WELL)], [Fate(WELL, 3)]])
    (notice,) = heard[1][3]
    assert (notice.note, notice.nbytes) == (b"note of 0", 2)
    assert [backend.told for backend in inner] == [["host:0", "host:1"]] * 2


def test_the_first_cause_is_told() -> None:
    _, heard = play([[Fate(NEVER)], [Fate(BADLY, 2)]])
    (notice,) = [notice for notices in heard[0] for notice in notices]
    assert (notice.error, notice.error_kind) == ("rank 1: badly", "TransferError")
