"""What an engine asks a store, and what came of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hicache_core.storage.answers import n_leading
from hicache_core.storage.segments import nbytes_of
from hicache_core.types import ExistsJob, Job, Page, ReadJob, WriteJob


class Kind(enum.Enum):
    """What a call does."""

    EXISTS = "exists"
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Request:
    """One call of an engine.

    Attributes:
        kind: what it does.
        keys: of the pages.
        pages: the engine's memory, one page for each key; none for ``EXISTS``.
        nbytes: length of the pages together.
    """

    kind: Kind
    keys: Sequence[str]
    pages: Sequence[Page] = ()
    nbytes: int = 0

    @classmethod
    def of(cls, kind: Kind, keys: Sequence[str], pages: Sequence[Page]) -> Request:
        """Returns a read or a write.

        Args:
            kind: which of them.
            keys: one for each page.
            pages: the engine's memory.

        Raises:
            ValueError: there is not one page for each key.
        """
        if len(keys) != len(pages):
            raise ValueError(f"{len(keys)} keys do not fit {len(pages)} pages")
        return cls(kind, keys, pages, sum(map(nbytes_of, pages)))

    def job(self, job_id: int, pages: Sequence[Page]) -> Job:
        """Returns the job that answers for each key, with ``pages`` in place of the engine's."""
        if self.kind is Kind.EXISTS:
            return ExistsJob(job_id, self.keys, each=True)
        made = ReadJob if self.kind is Kind.READ else WriteJob
        return made(job_id, self.keys, pages, self.nbytes, each=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call; nothing touches the caller's pages any more.

    Attributes:
        mask: for each page whether it is present, was read and verified, or is stored.
        error: why the store could not answer for all pages, for logs; empty if it did.
        elapsed_s: time the call took.
    """

    mask: Sequence[bool]
    error: str = ""
    elapsed_s: float = 0.0

    @property
    def n_leading(self) -> int:
        """How many leading pages the answer is yes for."""
        return n_leading(self.mask)


OnDone: TypeAlias = Callable[[Answer], None]
"""Called once with the answer, on a thread of the store or on the caller's. It must be short. If it
raises, that is logged."""
