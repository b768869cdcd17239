"""Settings of the guard that stands before a storage backend."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from hicache_core.storage.base import BackendConfig
from hicache_core.storage.settings import Seconds
from hicache_core.storage.workers.executor import Deadlines

Share = Annotated[float, Field(gt=0, le=1)]
"""A part of the whole, above 0 and at most 1."""


HANG_SHARE = 0.9
"""A call hangs at this part of its deadline: when the worker finds the job overdue and another
thread takes over, that thread must find the breaker open, or it would be lost too."""


class GuardConfig(BackendConfig):
    """Settings of a guard: its breaker, its retries, its memory of failed loads, its deadlines."""

    window_s: Seconds = Field(
        default=30.0, description="the breaker looks at the calls of so many seconds"
    )
    min_calls: int = Field(
        default=5, ge=1, description="fewer calls in the window than this open no breaker by a rate"
    )
    error_rate: Share = Field(
        default=0.5, description="the breaker opens when this share of calls fails"
    )
    slow_rate: Share = Field(
        default=0.8, description="the breaker opens when this share of calls is slow"
    )
    slow_s: Seconds = Field(
        default=1.0, description="a call is slow that takes longer, beside slow_per_gib_s"
    )
    slow_per_gib_s: float = Field(
        default=10.0, ge=0, description="seconds added to slow_s for each GiB of a call"
    )
    open_s: Seconds = Field(
        default=5.0,
        description="an open breaker asks the store again after this time; doubled each time that "
        "the store fails again",
    )
    max_open_s: Seconds = Field(default=60.0, description="upper limit of the doubled open_s")
    half_open_probes: int = Field(
        default=1, ge=1, description="so many calls must succeed before the breaker closes"
    )
    retries: int = Field(
        default=2, ge=0, description="a call that found no store is repeated at most so often"
    )
    retry_base_s: Seconds = Field(
        default=0.02,
        description="the pause before a retry is drawn between 0 and this, doubled each time",
    )
    retry_max_s: Seconds = Field(default=0.5, description="upper limit of the doubled pause")
    negative_ttl_s: Seconds = Field(
        default=10.0, description="a key whose load failed counts as absent for so long"
    )
    negative_max_keys: int = Field(
        default=10_000, ge=0, description="so many failed keys are remembered; 0 for none"
    )
    deadline_base_s: Seconds = Field(
        default=2.0, description="a storage job may take this long, beside deadline_per_gib_s"
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
        """What a storage job that makes one call may take."""
        return Deadlines(self.deadline_base_s, self.deadline_per_gib_s)

    @property
    def hang_limits(self) -> Deadlines:
        """What a call may take before it hangs: a little less than its job may."""
        return Deadlines(HANG_SHARE * self.deadline_base_s, HANG_SHARE * self.deadline_per_gib_s)

    @property
    def slow_limits(self) -> Deadlines:
        """What a call may take before it is slow."""
        return Deadlines(self.slow_s, self.slow_per_gib_s)
