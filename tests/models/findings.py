"""What the sweep finds out about a model: frozen, and sent between processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from hicache_core.types import CachedTokens
from tests.models.architectures import Case

TOLERANCE = 1e-4
"""How far logits may be apart, as a part of the largest: rounding, and no more."""


class Verdict(StrEnum):
    """What became of a model."""

    IDENTICAL = "identical"
    MISSED = "identical, but without a hit"
    REFUSED = "refused"
    WRONG = "wrong"
    CRASHED = "crashed"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Step:
    """One prompt that was answered with a cache.

    Attributes:
        name: what is tried.
        cached: tokens of the prompt that were cached, by tier.
        apart: the largest difference of logits from those without a cache, as a part of the
            largest; infinity for a token that is another one and less probable.
        error: what happened instead of an answer.
    """

    name: str
    cached: CachedTokens = field(default_factory=CachedTokens)
    apart: float = 0.0
    error: str = ""

    @property
    def is_identical(self) -> bool:
        """Whether the answer is that of the model alone."""
        return not self.error and self.apart < TOLERANCE

    @property
    def is_missed(self) -> bool:
        """Whether it is named after a tier, and nothing came from there."""
        return getattr(self.cached, self.name, 1) == 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a model in ``CachedModel``, or in the engine.

    Attributes:
        verdict: of all steps together.
        reason: why it was refused or not tried; where it went wrong.
        steps: in order.
        kept: the components of its KV, by group; empty if it was not opened.
    """

    verdict: Verdict
    reason: str = ""
    steps: tuple[Step, ...] = ()
    kept: str = ""

    @classmethod
    def of(cls, steps: tuple[Step, ...], kept: str) -> Outcome:
        """Judges the steps of a model that was opened."""
        bad = [step for step in steps if not step.is_identical]
        if wrong := [step for step in bad if not step.error]:
            reason = ", ".join(f"{step.name}: logits apart by {step.apart:.0e}" for step in wrong)
            return cls(Verdict.WRONG, reason, steps, kept)
        if bad:
            reason = ", ".join(f"{step.name}: {step.error}" for step in bad)
            return cls(Verdict.CRASHED, reason, steps, kept)
        if missed := [step.name for step in steps if step.is_missed]:
            return cls(Verdict.MISSED, f"nothing came from {', '.join(missed)}", steps, kept)
        return cls(Verdict.IDENTICAL, "", steps, kept)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about a model.

    Attributes:
        case: the model.
        adapter: what became of it in ``CachedModel``.
        engine: what became of it in the engine.
        layers: kinds of its layers, as transformers' own cache has them.
        moved: how far the logits move when one token of the prompt is another one: an early one,
            and one of the last cached page.
        advice: what was found out by following the advice of a refusal, if it had any.
    """

    case: Case
    adapter: Outcome
    engine: Outcome
    layers: tuple[str, ...] = ()
    moved: tuple[float, float] = (0.0, 0.0)
    advice: Finding | None = None

    @property
    def can_fail(self) -> bool:
        """Whether KV of other tokens would have been noticed.

        An early token is out of reach of layers that all have windows.
        """
        early, late = self.moved
        return late > 10 * TOLERANCE and (early > 10 * TOLERANCE or self.layers == ("window",))

    @property
    def final(self) -> Finding:
        """What was found out when all advice had been followed."""
        return self.advice.final if self.advice else self

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        """All outcomes, each with a name."""
        yield f"{self.case} in CachedModel", self.adapter
        yield f"{self.case} in the engine", self.engine
        if self.advice:
            yield from self.advice.outcomes()
