"""Settings of a chain of backends."""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

from pydantic import Field, model_validator

from hicache_core.storage.base import BackendConfig
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.settings import Nbytes, Seconds


class StoreConfig(BackendConfig):
    """Settings that every backend has beside its own, alone or as a link of a chain."""

    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="settings of the guard in front of this backend"
    )
    read_only: bool = Field(
        default=False,
        description="only read: nothing is stored or removed, and opening changes nothing",
    )


class LinkConfig(StoreConfig):
    """Settings of one link."""

    backend: str = Field(
        min_length=1, description="name of the backend, as for storage without a chain"
    )
    name: str = Field(
        default="",
        description="name of the link in messages and statistics; by default that of its backend",
    )
    config: dict[str, object] = Field(
        default_factory=dict, repr=False, description="the backend's own settings"
    )

    @property
    def label(self) -> str:
        """Name of the link."""
        return self.name or self.backend


class ChainConfig(BackendConfig):
    """Settings of the ``chain`` backend: several stores as L3, L4, ..., the nearest first."""

    links: tuple[LinkConfig, ...] = Field(
        min_length=1, description="the backends; the first one is tried first"
    )
    write: Literal["through", "behind"] = Field(
        default="through",
        description="through: a page counts as stored when all links have it; behind: when the "
        "first link has it, and the others get copies later",
    )
    promote: bool = Field(
        default=True, description="copy pages found in a lower link into the links above it"
    )
    max_behind_nbytes: Nbytes = Field(
        default=256 * 2**20,
        description="maximum bytes of copies that wait for one lower link; further copies are "
        "dropped and counted",
    )
    max_promote_nbytes: Nbytes = Field(
        default=256 * 2**20,
        description="maximum bytes of copies that wait for one upper link; further copies are "
        "dropped and counted",
    )
    settle_s: Seconds = Field(
        default=5.0, description="how long delete, clear and close wait for pending copies"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        twice = [name for name, n in Counter(link.label for link in self.links).items() if n > 1]
        if twice:
            raise ValueError(
                f"two links are named {twice[0]!r}; give them different names with 'name', so "
                "that messages and statistics can tell them apart"
            )
        return self
