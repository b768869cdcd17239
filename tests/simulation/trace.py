"""What a schedule did, step by step, and how it failed."""

from __future__ import annotations

from dataclasses import dataclass, field


class ScheduleFailed(AssertionError):
    """An invariant does not hold.

    Attributes:
        seed: replays it.
        trace: what happened, one line a step.
    """

    def __init__(self, seed: int, reason: str, trace: list[str]) -> None:
        """Keeps its arguments."""
        super().__init__(reason)
        self.seed = seed
        self.reason = reason
        self.trace = trace

    def __reduce__(self) -> tuple[type[ScheduleFailed], tuple[int, str, list[str]]]:
        """Travels between processes."""
        return type(self), (self.seed, self.reason, self.trace)


@dataclass(slots=True)
class Trace:
    """What happened so far.

    Attributes:
        is_loud: print each line at once.
        steps: moment, name and result of each step.
    """

    is_loud: bool = False
    steps: list[tuple[float, str, object]] = field(default_factory=list)

    def add(self, now: float, step: str, result: object) -> None:
        """One more step."""
        self.steps.append((now, step, result))
        if self.is_loud:
            print(self.line(len(self.steps) - 1), flush=True)

    def line(self, number: int) -> str:
        """One step as text."""
        now, step, result = self.steps[number]
        return f"{number:4d} {now:10.3f} s  {step}  ->  {result}"

    def lines(self) -> list[str]:
        """All steps as text."""
        return [self.line(number) for number in range(len(self.steps))]
