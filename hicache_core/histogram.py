"""Histograms: frozen to travel, growing to be filled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values fell below each bound.

    Attributes:
        bounds: upper bounds, ascending; a value equal to one belongs to it.
        counts: values of each bucket, not cumulative; one more than bounds, for what is above all.
        total: sum of all values.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    @property
    def n(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The smallest bound with at least ``share`` of the values below it; None without values.

        Values above all bounds answer the highest one.
        """
        if self.n == 0:
            return None
        wanted = share * self.n
        for bound, below in zip(self.bounds, accumulate(self.counts), strict=False):
            if below >= wanted:
                return bound
        return self.bounds[-1]


class Distribution:
    """Collects values into a ``Histogram``: one writing thread, read from any."""

    def __init__(self, bounds: Iterable[float]) -> None:
        """Starts empty; ``bounds`` are ascending upper bounds."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Counts ``value``."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def histogram(self) -> Histogram:
        """What was counted so far."""
        return Histogram(self._bounds, tuple(self._counts), self._total)
