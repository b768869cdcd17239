"""Running estimates of how long something takes, by its size."""

from __future__ import annotations

from itertools import accumulate

WEIGHT = 0.3
"""How much the newest observation counts."""

SURPRISE = 2.0
"""An observation this many times off says that speed has changed, at other sizes as well."""


class SizedEstimate:
    """Seconds for a job of n units, learned from jobs of other sizes.

    One exponentially weighted point (units, seconds) for each power of two of the size. What lies
    between two points is interpolated, what lies beyond the last has the slope of the last two::

        seconds |                 . *
                |           . *
                |       *
                |  *               (latency is the point at 0 units)
                +---------------------- units
    """

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float]] = {}  # power of two -> units, seconds
        self.latency_s = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything was observed."""
        return bool(self._points)

    @property
    def largest(self) -> float:
        """Units of the largest kind of job that was observed; 0 if none was."""
        return max((units for units, _ in self._points.values()), default=0.0)

    def observe_latency(self, elapsed_s: float) -> None:
        """A job of no size took ``elapsed_s``: what every other one takes at least."""
        old = self.latency_s or elapsed_s
        self.latency_s = old + WEIGHT * (elapsed_s - old)

    def observe(self, n: int, elapsed_s: float) -> None:
        """A job of ``n`` units took ``elapsed_s``."""
        if n < 1:
            return
        if self._points:
            self._follow(elapsed_s, self.predict(n))
        units, seconds = self._points.get(n.bit_length(), (float(n), elapsed_s))
        self._points[n.bit_length()] = (
            units + WEIGHT * (n - units),
            seconds + WEIGHT * (elapsed_s - seconds),
        )

    def predict(self, n: int) -> float:
        """Expected seconds for ``n`` units; 0 for none. Something must be known."""
        if n < 1:
            return 0.0
        known = sorted(self._points.values())
        units = [0.0, *(units for units, _ in known)]
        latency_s = min(self.latency_s, known[0][1])
        seconds = list(accumulate([latency_s, *(s for _, s in known)], max))  # more is never faster
        last = len(units) - 1
        at = next((i for i in range(1, last) if n <= units[i]), last)
        slope = (seconds[at] - seconds[at - 1]) / (units[at] - units[at - 1])
        return seconds[at - 1] + slope * (n - units[at - 1])

    def _follow(self, elapsed_s: float, expected_s: float) -> None:
        """Moves all points when one is far off: what changed is the speed, not the size."""
        if expected_s <= 0 or expected_s / SURPRISE <= elapsed_s <= expected_s * SURPRISE:
            return
        factor = (elapsed_s / expected_s) ** WEIGHT
        self._points = {k: (units, s * factor) for k, (units, s) in self._points.items()}
