"""Clearing: a store from which all ranks remove what they have put there."""

from __future__ import annotations

from dataclasses import dataclass

from hicache_core.controller.attachment import Attachment
from hicache_core.errors import HiCacheError
from hicache_core.storage.base import Clearable

ANY_COUNT = 2**31 - 1
"""What a rank reports of another one's objects: the least counts, and that is the other's."""


@dataclass(slots=True, eq=False)
class Clearing:
    """The objects of this cache's namespaces are being removed while requests run.

    Attributes:
        attachment: the backend, and this rank's namespace.
        n_ranks_left: ranks of which it is not known yet how many objects they removed.
        n_objects: removed by the others.
        error: why a rank failed; empty if none did.
    """

    attachment: Attachment
    n_ranks_left: int
    n_objects: int = 0
    error: str = ""
    _reported: int = 0
    _ended: bool = False

    @property
    def done(self) -> bool:
        """Whether all ranks have ended; set by ``poll``."""
        return self.n_ranks_left == 0

    @property
    def report(self) -> int | None:
        """What this rank reports: one more than it removed, 0 if it failed; None until then."""
        return self._reported if self._ended else None

    def run(self) -> None:
        """Removes this rank's objects, unless another one writes them; on whatever thread."""
        attachment = self.attachment
        try:
            n_objects = 0
            if attachment.is_writer:
                clearable = attachment.backend.capability(Clearable)
                assert clearable is not None  # who asks to clear has looked
                n_objects = clearable.clear(f"{attachment.namespace}/")
            self._reported = 1 + n_objects
        except HiCacheError as error:
            self.error = str(error)
        finally:
            self._ended = True

    def fail(self, error: RuntimeError) -> None:
        """It could not even be tried."""
        self.error, self._ended = str(error), True

    def settle(self, reported: int) -> None:
        """Takes what one rank reported."""
        self.n_ranks_left -= 1
        self.n_objects += max(0, reported - 1)
        if reported == 0:
            self.error = self.error or "a rank could not; its log says why"
