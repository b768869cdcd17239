"""What became of each object that was to be moved, and the sums."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hicache_core.storage.base import namespace_of


class Outcome(enum.StrEnum):
    """What became of one object."""

    COPIED = "copied"
    PRESENT = "present"  # the target had it already
    DAMAGED = "damaged"  # its seal is wrong; not copied
    REFUSED = "refused"  # of another cache or version, or not a page; not copied
    VANISHED = "vanished"  # listed, but gone when it was read
    NO_ROOM = "no_room"  # the target had no room for it


class Result(NamedTuple):
    """What became of one object.

    Attributes:
        key: of the object.
        outcome: what became of it.
        nbytes: its length; 0 if it was not read.
        reason: why it was not copied.
    """

    key: str
    outcome: Outcome
    nbytes: int = 0
    reason: str = ""


@dataclass
class Totals:
    """Sums of what was moved, by namespace and outcome.

    Attributes:
        objects: number of objects.
        nbytes: their bytes, as far as they were read.
        n_cut: objects that an archive has a part of, at its end.
        n_missing: objects that an archive was planned to have, and lacks.
        n_gone: objects, at least, that the target has lost again after they were copied.
        stopped: why not everything was tried; empty if it was.
    """

    objects: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    nbytes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    n_cut: int = 0
    n_missing: int = 0
    n_gone: int = 0
    stopped: str = ""

    def add(self, result: Result) -> None:
        """Adds one result."""
        where = (namespace_of(result.key), result.outcome)
        self.objects[where] += 1
        self.nbytes[where] += result.nbytes

    def n(self, outcome: Outcome) -> int:
        """Number of objects with this outcome."""
        return sum(n for (_, its), n in self.objects.items() if its is outcome)

    @property
    def copied_nbytes(self) -> int:
        """Bytes of the objects that were copied."""
        return sum(n for (_, its), n in self.nbytes.items() if its is Outcome.COPIED)

    @property
    def is_whole(self) -> bool:
        """Whether everything that the source has is in the target now.

        What vanished from the source meanwhile does not count: the source has it no longer.
        """
        lost = (Outcome.DAMAGED, Outcome.REFUSED, Outcome.NO_ROOM)
        short = self.stopped or self.n_cut or self.n_missing or self.n_gone
        return not (short or any(map(self.n, lost)))

    def by_namespace(self) -> dict[str, dict[str, Mapping[str, int]]]:
        """Returns namespace -> outcome -> ``objects`` and ``nbytes``, sorted by name."""
        told: dict[str, dict[str, Mapping[str, int]]] = {}
        for namespace, outcome in sorted(self.objects):
            where = (namespace, outcome)
            sums = {"objects": self.objects[where], "nbytes": self.nbytes[where]}
            told.setdefault(namespace, {})[outcome.value] = sums
        return told
