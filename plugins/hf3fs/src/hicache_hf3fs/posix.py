"""The POSIX mode: ``preadv`` and ``pwritev`` between slots and the pages' own memory."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from hicache_core.plugin.backends import Lanes
from hicache_hf3fs.page_io import PageIO, Transfer

_IOV_MAX = os.sysconf("SC_IOV_MAX")


class PosixIO(PageIO):
    """For any file system. Up to ``n_threads`` threads share a large call."""

    mode: ClassVar[str] = "posix"

    def __init__(self, n_threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lanes = Lanes(n_threads, "hicache-hf3fs")

    def close(self) -> None:
        self._lanes.close()

    def read(
        self, transfers: Sequence[Transfer], deadline: float, arrived: Callable[[int], bool]
    ) -> list[int]:
        # docstring inherited
        def read_part(part: range) -> list[int]:
            results = []
            for n in part:
                transfer = transfers[n]
                result = _vectored(os.preadv, transfer)
                if self._clock() > deadline:
                    result = -errno.ETIME
                elif result == transfer.nbytes and not arrived(n):
                    result = -errno.EBADMSG
                results.append(result)
            return results

        return self._in_parts(read_part, transfers)

    def write(
        self, transfers: Sequence[Transfer], deadline: float, leaving: Callable[[int], None]
    ) -> list[int]:
        # docstring inherited
        def write_one(n: int) -> int:
            leaving(n)
            if self._clock() > deadline:
                return -errno.ETIME
            return _vectored(os.pwritev, transfers[n])

        return self._in_parts(lambda part: [write_one(n) for n in part], transfers)

    def _in_parts(
        self, move: Callable[[range], list[int]], transfers: Sequence[Transfer]
    ) -> list[int]:
        if len(transfers) == 1:
            return move(range(1))
        parts = self._lanes.split(len(transfers), sum(transfer.nbytes for transfer in transfers))
        return [result for part in self._lanes.run(move, parts) for result in part]


def _vectored(call: Callable[[int, list[memoryview], int], int], transfer: Transfer) -> int:
    """Moves a transfer, nearly always in one call; returns its bytes or a negative errno."""
    fd, offset, nbytes, buffers = transfer
    done = 0
    try:
        if len(buffers) <= _IOV_MAX:
            done = call(fd, buffers, offset)
            if done == nbytes:
                return done
            buffers = _behind(buffers, done)
        while buffers:
            n = call(fd, buffers[:_IOV_MAX], offset + done)
            if n == 0:
                break
            done += n
            buffers = _behind(buffers, n)
    except OSError as exc:
        return -(exc.errno or errno.EIO)
    return done


def _behind(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """Returns the buffers after the first ``nbytes``; none of them is empty."""
    for n, buffer in enumerate(buffers):
        if nbytes < buffer.nbytes:
            rest = [buffer[nbytes:], *buffers[n + 1 :]]
            return [buffer for buffer in rest if buffer.nbytes]
        nbytes -= buffer.nbytes
    return []
