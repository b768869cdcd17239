"""The journal of what each tier gains and loses: for events to routers and for explanations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from hicache_core.kv.spec import Group
from hicache_core.types import Namespace, Tier


@dataclass(frozen=True, slots=True)
class PageRun:
    """Consecutive pages of one prefix.

    Attributes:
        parent: digest of the page before the first: 32 bytes, a chain's seed, or empty.
        digests: 32 bytes a page, packed.
        tokens: packed token ids of these pages.
        seed: seed of the chain, which tells namespaces apart; empty for the default one.
        stored: storage has these pages, or they are being written to it.
        group: the group of layers whose units are meant; None for the full pages. A snapshot of a
            state is the unit of the page that it was taken after.
        group_index: 0 for the full pages, otherwise 1 for the first group of the spec, and so on.
    """

    parent: bytes
    digests: bytes
    tokens: bytes | memoryview
    seed: bytes
    stored: bool = False
    group: Group | None = None
    group_index: int = 0


class Journal(ABC):
    """Receives every page that a tier gains or loses. Owner thread; must not block or raise.

    Attributes:
        hears_gains: whether to call ``stored``. This costs the digests of all inserted pages,
            computed on the owner thread.
    """

    hears_gains: bool = True

    def named(self, seed: bytes, namespace: Namespace) -> None:  # noqa: B027 - few want the names
        """Later runs with this ``seed`` belong to ``namespace``.

        Not called for the default namespace, nor for journals that do not hear gains.
        """

    @abstractmethod
    def stored(self, tier: Tier, run: PageRun) -> None:
        """``tier`` holds the pages of ``run`` from now on, readable."""

    @abstractmethod
    def removed(self, tier: Tier, run: PageRun, cause: str) -> None:
        """``tier`` no longer holds the pages of ``run``.

        Args:
            tier: the tier.
            run: the pages.
            cause: ``evicted``; ``stored``, if the host freed them since storage has them;
                ``flushed``; or ``outside_window``, of units that no prefix needs on the device.
        """

    @abstractmethod
    def cleared(self) -> None:
        """All earlier records are void, for every tier; the records that follow are complete."""


class Journals(Journal):
    """Passes records to several journals, in order."""

    def __init__(self, journals: Sequence[Journal]) -> None:
        self._journals = tuple(journals)
        self.hears_gains = any(journal.hears_gains for journal in journals)

    def named(self, seed: bytes, namespace: Namespace) -> None:
        # docstring inherited
        for journal in self._journals:
            if journal.hears_gains:
                journal.named(seed, namespace)

    def stored(self, tier: Tier, run: PageRun) -> None:
        # docstring inherited
        for journal in self._journals:
            if journal.hears_gains:
                journal.stored(tier, run)

    def removed(self, tier: Tier, run: PageRun, cause: str) -> None:
        # docstring inherited
        for journal in self._journals:
            journal.removed(tier, run, cause)

    def cleared(self) -> None:
        # docstring inherited
        for journal in self._journals:
            journal.cleared()
