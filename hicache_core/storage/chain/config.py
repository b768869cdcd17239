"""Settings of a chain of backends."""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

from pydantic import Field, model_validator

from hicache_core.storage.base import BackendConfig
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.settings import Nbytes, Seconds


class LinkConfig(BackendConfig):
    """One backend of a chain."""

    backend: str = Field(min_length=1, description="name of the backend, as if it stood alone")
    name: str = Field(
        default="", description="name of the link in messages and figures; that of its backend"
    )
    config: dict[str, object] = Field(
        default_factory=dict, repr=False, description="the backend's own settings"
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="settings of the guard before this backend"
    )

    @property
    def label(self) -> str:
        """What the link is called."""
        return self.name or self.backend


class ChainConfig(BackendConfig):
    """Settings of the ``chain`` backend: several stores as L3, L4, ..., the nearest first."""

    links: tuple[LinkConfig, ...] = Field(
        min_length=1, description="the backends, the one that is asked first in front"
    )
    write: Literal["through", "behind"] = Field(
        default="through",
        description="through: a page counts as stored when all links have it; behind: when the "
        "first has it, and the others get a copy later",
    )
    promote: bool = Field(
        default=True, description="copy a page that a lower link had into those above it"
    )
    max_behind_nbytes: Nbytes = Field(
        default=256 * 2**20,
        description="copies that wait for one lower link; what is above is dropped and counted",
    )
    max_promote_nbytes: Nbytes = Field(
        default=256 * 2**20,
        description="copies that wait for one upper link; what is above is dropped and counted",
    )
    settle_s: Seconds = Field(
        default=5.0, description="delete, clear and close wait so long for copies under way"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        twice = [name for name, n in Counter(link.label for link in self.links).items() if n > 1]
        if twice:
            raise ValueError(
                f"two links are called {twice[0]!r}; give each a 'name' of its own, so that "
                "messages and figures can tell them apart"
            )
        return self
