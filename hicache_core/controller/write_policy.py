"""When a device page is copied to the host: one small object a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class WritePolicy(ABC):
    """Decides when pages go down from the device to the host, and from there to storage."""

    @abstractmethod
    def backs_up(self, n_uses: int) -> bool:
        """Whether a node that ``n_uses`` requests have used is copied to the host now."""

    @property
    @abstractmethod
    def backs_up_before_eviction(self) -> bool:
        """Whether a page without a host copy is copied before it leaves the device."""


@dataclass(frozen=True, slots=True)
class WriteThrough(WritePolicy):
    """Copies a node once ``threshold`` requests have used it.

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
