"""The step that settles what has finished, and the waits that are made of such steps."""

from __future__ import annotations

from hicache_core.controller.parts import Parts
from hicache_core.controller.prefetch import PrefetchPath
from hicache_core.controller.write_path import WritePath

WAIT_S = 1.0
"""No wait is longer, so that a deadline of a job is noticed soon after it has passed."""

RETRY_S = 0.01
"""So long a wait is, while other ranks keep this one waiting."""


class Settling:
    """Settles jobs on all ranks alike. Owner thread only."""

    def __init__(
        self, parts: Parts, write_path: WritePath, prefetch_path: PrefetchPath | None
    ) -> None:
        self._parts = parts
        self._write_path = write_path
        self._prefetch_path = prefetch_path

    def settle(self, flag: int = 1) -> int:
        """One ``poll``: enters the collective once; the least of the ranks' flags."""
        parts = self._parts
        parts.jobs.collect_copies()
        if parts.storage is not None:
            parts.storage.collect()
        if self._prefetch_path is not None:
            self._prefetch_path.tick()
        agreement = parts.jobs.agree(flag)
        for settle, n_pages in agreement.settled:
            settle(n_pages)
        if parts.storage is not None:
            parts.storage.sweep()
        return agreement.flag

    def wait(self, timeout_s: float, *, for_all: bool = False) -> None:
        """Waits until storage or a copy has news, or for ``timeout_s``; less long while other ranks
        or the window keep what this rank has reported, but never not at all.

        Args:
            timeout_s: seconds.
            for_all: one piece of storage's news is not enough: all that it was given must end.
        """
        parts = self._parts
        if parts.jobs.has_reports:  # that news was heard just now
            timeout_s = min(timeout_s, RETRY_S)
        if parts.jobs.oldest_copy is not None:
            parts.jobs.oldest_copy.wait(timeout_s)
        elif parts.storage is not None and parts.storage.attachments:
            parts.storage.wait(timeout_s, for_all=for_all)
        else:  # nothing of this rank can have news; another rank's copy may, or a timer
            parts.sleep(min(timeout_s, RETRY_S))

    def drain(self, timeout_s: float) -> bool:
        """Waits until all writes have settled and storage has flushed; False if time ran out.

        Every rank enters the same number of collectives, whatever its own clock says.
        """
        parts = self._parts
        deadline = parts.clock() + timeout_s
        in_time = self.settle(int(timeout_s > 0))
        while in_time and not self._write_path.idle:
            self.wait(min(max(deadline - parts.clock(), 0.0), WAIT_S), for_all=True)
            in_time = self.settle(int(parts.clock() < deadline))
        if not in_time or parts.storage is None:
            return bool(in_time)
        left_s = max(0.0, deadline - parts.clock())
        return bool(self.settle(int(parts.storage.flush(left_s))))
