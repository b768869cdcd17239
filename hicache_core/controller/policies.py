"""The policies of a cache: when pages go down, how long requests wait, what the host keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hicache_core.radix.node import Node, path_to_root

NOWHERE = 0
"""The epoch while no storage is attached. No page is stored in it."""


class WritePolicy(ABC):
    """Decides when pages are copied from the device to the host, and from there to storage."""

    @abstractmethod
    def backs_up(self, n_uses: int) -> bool:
        """Whether a node that ``n_uses`` requests have used is copied to the host now."""

    @property
    @abstractmethod
    def backs_up_before_eviction(self) -> bool:
        """Whether a page without a host copy is copied before it leaves the device."""


@dataclass(frozen=True, slots=True)
class WriteThrough(WritePolicy):
    """Copies a node as soon as ``threshold`` requests have used it.

    1 is SGLang's ``write_through``, 2 its ``write_through_selective``.
    """

    threshold: int = 1

    def backs_up(self, n_uses: int) -> bool:
        # docstring inherited
        return n_uses >= self.threshold

    @property
    def backs_up_before_eviction(self) -> bool:
        # docstring inherited
        return False


@dataclass(frozen=True, slots=True)
class WriteBack(WritePolicy):
    """Copies a node only when it is about to leave the device."""

    def backs_up(self, n_uses: int) -> bool:  # noqa: ARG002
        # docstring inherited
        return False

    @property
    def backs_up_before_eviction(self) -> bool:
        # docstring inherited
        return True


class PrefetchPolicy(ABC):
    """Decides how long a request waits for what storage has not delivered yet."""

    @abstractmethod
    def limit_s(self, n_tokens: int) -> float | None:
        """Seconds that a request waits, from when the scheduler first wanted to run it.

        Args:
            n_tokens: tokens that storage was asked for.

        Returns:
            0 never to wait; None to wait until storage has delivered or failed.
        """


@dataclass(frozen=True, slots=True)
class BestEffort(PrefetchPolicy):
    """Never waits: takes what has arrived when the scheduler is ready."""

    def limit_s(self, n_tokens: int) -> float | None:  # noqa: ARG002
        # docstring inherited
        return 0.0


@dataclass(frozen=True, slots=True)
class WaitComplete(PrefetchPolicy):
    """Waits until storage has delivered or failed: the highest reuse."""

    def limit_s(self, n_tokens: int) -> float | None:  # noqa: ARG002
        # docstring inherited
        return None


@dataclass(frozen=True, slots=True)
class Timeout(PrefetchPolicy):
    """Waits for a limited time that grows with the number of tokens asked for.

    The limit is ``base_s + per_ki_token_s * n_tokens / 1024``, as in SGLang 0.5.

    Attributes:
        base_s: seconds that every request may wait.
        per_ki_token_s: seconds added for each 1,024 tokens.
    """

    base_s: float = 1.0
    per_ki_token_s: float = 0.25

    def limit_s(self, n_tokens: int) -> float | None:
        # docstring inherited
        return self.base_s + self.per_ki_token_s * n_tokens / 1024


class HostRetention(ABC):
    """Decides whether the host keeps pages that storage has. Owner thread; all ranks decide alike.

    A page counts as stored once all ranks know that a write of it was acknowledged.

    Attributes:
        keeps_stored: whether the host keeps units of groups that storage has.
    """

    keeps_stored: ClassVar[bool] = True

    @abstractmethod
    def wants(self, node: Node, epoch: int) -> bool:
        """Whether the host is to get a copy of pages that only the device has.

        Args:
            node: the pages.
            epoch: of the storage that is attached; ``NOWHERE`` without one.
        """

    @abstractmethod
    def spare(self, node: Node, epoch: int) -> Iterator[Node]:
        """Nodes whose host pages may go, now that a write of ``node`` has ended, deepest first.

        The caller drops each node before it asks for the next.

        Args:
            node: the end of the run that was written.
            epoch: of the storage that is attached; ``NOWHERE`` without one.
        """


class KeepOnHost(HostRetention):
    """The host is a cache: pages stay until others need their room."""

    def wants(self, node: Node, epoch: int) -> bool:  # noqa: ARG002
        # docstring inherited
        return True

    def spare(self, node: Node, epoch: int) -> Iterator[Node]:  # noqa: ARG002
        # docstring inherited
        return iter(())


class FreeOnceStored(HostRetention):
    """The host only passes pages on: storage has them, and others load them from there.

    A page that a request or a copy needs on the host when its write ends stays until it is evicted.
    So does a page whose write failed.
    """

    keeps_stored = False

    def wants(self, node: Node, epoch: int) -> bool:
        # docstring inherited
        return epoch == NOWHERE or node.stored_in != epoch

    def spare(self, node: Node, epoch: int) -> Iterator[Node]:
        # docstring inherited; the nodes above may have waited for this one
        for at in list(path_to_root(node)):
            if epoch != NOWHERE and at.stored_in == epoch and at.may_spare_host():
                yield at


@dataclass(slots=True)
class Policies:
    """The policies that an operator may change while requests run.

    They are looked up whenever something is decided, so a change counts from the next decision on.
    Owner thread only; all ranks change alike.

    Attributes:
        write: when pages go down.
        prefetch: how long a request waits for storage.
        prefetch_threshold: tokens that must be missing before storage is asked.
    """

    write: WritePolicy
    prefetch: PrefetchPolicy
    prefetch_threshold: int
