"""What objects are moved from and to: the two sides of a move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from hicache_core.storage.moving.outcomes import Outcome, Result
from hicache_core.storage.moving.slab import Slab
from hicache_core.storage.moving.terms import Said, Terms
from hicache_core.storage.scrub import UNKNOWN
from hicache_core.types import Page


class Intact(NamedTuple):
    """An object whose seal is right.

    Attributes:
        key: of the object.
        page: its bytes, header included, in one segment.
    """

    key: str
    page: Page

    def ended(self, outcome: Outcome, reason: str = "") -> Result:
        """Its result."""
        return Result(self.key, outcome, self.page[0].nbytes, reason)


class Batch(NamedTuple):
    """What one turn of a worker brought.

    Attributes:
        intact: what is to be written; its memory is valid until the next turn.
        others: what became of the other objects.
    """

    intact: list[Intact]
    others: list[Result]

    def take(self, one: Intact | Result, terms: Terms) -> None:
        """Adds an object, or what became of it; an intact one must be as ``terms`` say."""
        if isinstance(one, Result):
            self.others.append(one)
        elif why := terms.objection(one.key, one.page[0].nbytes):
            self.others.append(one.ended(Outcome.REFUSED, why))
        else:
            self.intact.append(one)


_NOT_OURS = {
    UNKNOWN: "it is not a page of HiCache",
    "wrong_version": "another version of HiCache sealed it",
}


def wrong(key: str, kind: str, nbytes: int) -> Result:
    """The result for an object that is not intact.

    Args:
        key: of the object.
        kind: as of ``scrub.classify``.
        nbytes: its length.
    """
    if why := _NOT_OURS.get(kind):
        return Result(key, Outcome.REFUSED, nbytes, why)
    return Result(key, Outcome.DAMAGED, nbytes, kind)


class Target(Protocol):
    """Where objects are moved to. Any worker may call."""

    def said(self, namespace: str) -> Said:
        """What it says of a namespace; to be asked before anything of it is written."""
        ...

    def has(self, keys: Sequence[str]) -> Sequence[bool]:
        """Returns, for each key, whether its object is there already."""
        ...

    def write(self, objects: Sequence[Intact]) -> Sequence[bool]:
        """Returns, for each object, whether it is there now; False: there is no room for it."""
        ...


class Source(Protocol):
    """Where objects come from. Any worker may call."""

    def take(self, slab: Slab, target: Target) -> Batch | None:
        """Reads the next objects that ``target`` lacks, and checks their seals.

        Args:
            slab: memory of the calling worker.
            target: asked for what it has.

        Returns:
            None if there are no more.
        """
        ...
