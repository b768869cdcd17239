"""Settings of the guard in front of a storage backend."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from hicache_core.storage.base import BackendConfig
from hicache_core.storage.settings import Seconds
from hicache_core.storage.workers.executor import Deadlines

Share = Annotated[float, Field(gt=0, le=1)]
"""A fraction greater than 0 and at most 1."""


HANG_SHARE = 0.9
"""A call counts as hanging after this fraction of its deadline. When the worker replaces the thread
of an overdue job, the new thread must find the breaker open, or it would hang too."""


class GuardConfig(BackendConfig):
    """Settings of a guard: circuit breaker, retries, failed keys and deadlines."""

    window_s: Seconds = Field(
        default=30.0, description="the breaker judges the calls of the last so many seconds"
    )
    min_calls: int = Field(
        default=5, ge=1, description="with fewer calls in the window, no rate opens the breaker"
    )
    error_rate: Share = Field(
        default=0.5, description="the breaker opens when this fraction of calls fails"
    )
    slow_rate: Share = Field(
        default=0.8, description="the breaker opens when this fraction of calls is slow"
    )
    slow_s: Seconds = Field(
        default=1.0, description="a call that takes longer is slow; slow_per_gib_s is added"
    )
    slow_per_gib_s: float = Field(
        default=10.0, ge=0, description="seconds added to slow_s for each GiB of a call"
    )
    open_s: Seconds = Field(
        default=5.0,
        description="an open breaker tries the store again after this time, which doubles each "
        "time the store fails again",
    )
    max_open_s: Seconds = Field(default=60.0, description="upper limit of the doubled open_s")
    half_open_probes: int = Field(
        default=1, ge=1, description="trial calls that must succeed before the breaker closes"
    )
    retries: int = Field(
        default=2, ge=0, description="maximum number of retries when the store cannot be reached"
    )
    retry_base_s: Seconds = Field(
        default=0.02,
        description="the pause before a retry is random, up to this, which doubles each time",
    )
    retry_max_s: Seconds = Field(default=0.5, description="upper limit of the doubled pause")
    negative_ttl_s: Seconds = Field(
        default=10.0, description="how long a key counts as absent after its load failed"
    )
    negative_max_keys: int = Field(
        default=10_000, ge=0, description="maximum number of failed keys to remember; 0 for none"
    )
    deadline_base_s: Seconds = Field(
        default=2.0, description="a storage job may take this long; deadline_per_gib_s is added"
    )
    deadline_per_gib_s: float = Field(
        default=20.0, ge=0, description="seconds added to the deadline for each GiB of a job"
    )

    @model_validator(mode="after")
    def _limits_are_limits(self) -> Self:
        for low, high in (("open_s", "max_open_s"), ("retry_base_s", "retry_max_s")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} must be at most {high}")
        return self

    @property
    def deadlines(self) -> Deadlines:
        """Time that a storage job with one call may take."""
        return Deadlines(self.deadline_base_s, self.deadline_per_gib_s)

    @property
    def hang_limits(self) -> Deadlines:
        """Time after which a call counts as hanging; a little less than its job may take."""
        return Deadlines(HANG_SHARE * self.deadline_base_s, HANG_SHARE * self.deadline_per_gib_s)

    @property
    def slow_limits(self) -> Deadlines:
        """Time after which a call counts as slow."""
        return Deadlines(self.slow_s, self.slow_per_gib_s)
