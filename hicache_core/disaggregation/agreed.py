"""AgreedTransfer: transfers that end with the same outcome in the same step on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from hicache_core.disaggregation.wrapper import TransferWrapper
from hicache_core.errors import HiCacheError, TransferError
from hicache_core.kv_transfer.base import (
    KvTransferBackend,
    Notice,
    TransferState,
    UnitRows,
)
from hicache_core.ranks.base import RankGroup, agree_all

_ELSEWHERE = "the transfer failed on another rank"


class AgreedTransfer(TransferWrapper):
    """The transfer backend of one rank; each rank of a node has one and moves its own heads.

    A room succeeds if it succeeds on every rank. If it fails on one, the others cancel it. Its
    notice comes in the same ``poll`` on all ranks, when no rank's transfer uses its pages any more,
    so that all ranks decide alike.

    Every rank makes the same calls in the same order. ``open`` is a collective, and so is ``poll``
    while a room has not ended. A room is offered or received here, not both.

    Raises:
        RankLost: from ``open`` and ``poll``, when another rank is lost.
    """

    name = "agreed"

    def __init__(self, inner: KvTransferBackend, ranks: RankGroup) -> None:
        """``inner`` is not open yet; its context says which rank this is."""
        super().__init__(inner)
        self._ranks = ranks
        self._rooms: dict[int, Notice | None] = {}  # the same rooms on all ranks; how each ended

    def open(self) -> None:
        # docstring inherited
        super().open()
        self.introduce(self._ranks.gather(self.address))

    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        # docstring inherited
        self._begin(room, lambda: self._inner.offer(room, n_tokens, timeout_s))

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
        receive = super().receive
        self._begin(room, lambda: receive(room, addresses, pages, tokens, timeout_s, groups))

    def poll(self) -> list[Notice]:
        # docstring inherited
        for notice in super().poll():
            self._rooms[notice.room] = notice
        rooms = list(self._rooms)
        ended = [self._rooms[room] is not None for room in rooms]
        well = [not _has_failed(self._rooms[room]) for room in rooms]
        agreed = agree_all(self._ranks, [*ended, *well])
        done: list[int] = []
        for room, has_ended, is_well in zip(
            rooms, agreed[: len(rooms)], agreed[len(rooms) :], strict=True
        ):
            if has_ended:
                done.append(room)
            elif not is_well and self._rooms[room] is None:
                self.cancel(room, _ELSEWHERE)
        return self._told(done) if done else []

    def _begin(self, room: int, begin: Callable[[], None]) -> None:
        """A room that this rank alone cannot begin has failed, as all will hear."""
        if room in self._rooms:
            raise TransferError(f"room {room} is taken by another request")
        self._rooms[room] = None
        try:
            begin()
        except HiCacheError as error:
            self._rooms[room] = _failed(room, str(error), type(error).__name__)

    def _told(self, done: Sequence[int]) -> list[Notice]:
        """One notice for each room that has ended on all ranks, made of all their notices."""
        mine = [self._rooms.pop(room) for room in done]
        texts = self._ranks.gather(
            json.dumps([_packed(notice) for notice in mine if notice is not None])
        )
        by_rank = [[_unpacked(fields) for fields in json.loads(text)] for text in texts]
        return [_joined(notices) for notices in zip(*by_rank, strict=True)]


def _joined(notices: Sequence[Notice]) -> Notice:
    """The notice of a room that ended so on each rank, by rank."""
    nbytes = sum(notice.nbytes for notice in notices)
    elapsed_s = max(notice.elapsed_s for notice in notices)
    failed = [(rank, notice) for rank, notice in enumerate(notices) if _has_failed(notice)]
    if not failed:
        first = notices[0]
        return Notice(first.room, first.state, "", "", first.note, nbytes, elapsed_s)
    rank, cause = min(failed, key=lambda one: one[1].error == _ELSEWHERE)
    error = f"rank {rank}: {cause.error}"
    return _failed(cause.room, error, cause.error_kind, nbytes, elapsed_s)


def _failed(
    room: int, error: str, error_kind: str, nbytes: int = 0, elapsed_s: float = 0.0
) -> Notice:
    return Notice(room, TransferState.FAILED, error, error_kind, b"", nbytes, elapsed_s)


def _has_failed(notice: Notice | None) -> bool:
    return notice is not None and notice.state is TransferState.FAILED


def _packed(notice: Notice) -> list[object]:
    return [
        notice.room,
        notice.state.value,
        notice.error,
        notice.error_kind,
        notice.note.hex(),
        notice.nbytes,
        notice.elapsed_s,
    ]


def _unpacked(fields: Sequence[Any]) -> Notice:
    room, state, error, error_kind, note, *counts = fields
    return Notice(room, TransferState(state), error, error_kind, bytes.fromhex(note), *counts)
