"""How much of what storage has is worth loading: one small object a policy."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

log = logging.getLogger(__name__)

MARGIN = 0.03
"""The other choice must be expected to be better by this share before the policy changes its mind.

Estimates are noisy, and changing back and forth costs more than changing a little late."""

PROBE_BUDGET = 0.01
"""Share of all time to first token that may be spent on loads that are not expected to pay."""

FIRST_PROBE_PAGES = 4
"""Pages of the smallest probe; larger ones are by powers of ``GROWTH``."""

GROWTH = 4

WEIGHT = 0.3
"""The weight of the newest observation, from 0 to 1."""

SURPRISE = 2.0
"""An observation that is off by this factor means that the speed has changed at all sizes."""


@dataclass(frozen=True, slots=True)
class PrefetchCandidate:
    """Pages that could be prefetched for a request: what storage has, and what the request lacks.

    Attributes:
        request_id: for the log.
        n_found: leading pages that storage says it has.
        n_missing_tokens: tokens that neither device nor host has.
        page_size: tokens per page.
        batch_pages: pages per read.
    """

    request_id: str
    n_found: int
    n_missing_tokens: int
    page_size: int
    batch_pages: int


OUTCOMES = ("all", "part", "none", "probe")


class Admission(ABC):
    """Decides how many of a candidate's pages are loaded, and learns from the result.

    Owner thread only.

    Attributes:
        has_patience: whether the policy limits how long a request waits; the same on every rank.
        decisions: how often each outcome was chosen: ``all``, ``part``, ``none``, ``probe``.
    """

    has_patience: ClassVar[bool] = False

    def __init__(self) -> None:
        self.decisions = Counter(dict.fromkeys(OUTCOMES, 0))  # a rate sees the first one, too

    def is_worth_asking(self, candidate: PrefetchCandidate) -> bool:  # noqa: ARG002 - some always ask
        """Whether to ask storage at all, assuming that it has all of ``candidate.n_found``."""
        return True

    @abstractmethod
    def admit(self, candidate: PrefetchCandidate) -> int:
        """How many leading pages to load, from 0 to ``candidate.n_found``."""

    def patience_s(self, n_tokens: int) -> float | None:  # noqa: ARG002 - some have no limit
        """The longest a request waits for ``n_tokens``, in seconds; None for no limit."""
        return None

    def asked(self, elapsed_s: float) -> None:  # noqa: B027 - some do not learn
        """Storage answered a question in ``elapsed_s``."""

    def loaded(self, n_pages: int, elapsed_s: float) -> None:  # noqa: B027
        """A load of ``n_pages`` took ``elapsed_s``, from its submission to its last page."""

    def prefilled(self, n_tokens: int, elapsed_s: float) -> None:  # noqa: B027
        """The engine computed ``n_tokens`` of a prompt in ``elapsed_s``."""


class AlwaysAdmit(Admission):
    """Loads all that storage has."""

    def admit(self, candidate: PrefetchCandidate) -> int:
        # docstring inherited
        self.decisions["all"] += 1
        return candidate.n_found


class SizedEstimate:
    """Estimates the seconds of a job of n units, learned from jobs of other sizes.

    It keeps one exponentially weighted point (units, seconds) for each power of two of the size. It
    interpolates between points; beyond the last point it uses the slope of the last two::

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

    def observe_latency(self, elapsed_s: float) -> None:
        """A job of 0 units took ``elapsed_s``, which every larger job takes at least."""
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
        """Expected seconds for ``n`` units; 0 for 0 units. ``is_known`` must be True."""
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
        """Moves all points when one is far off: the speed has changed, at all sizes."""
        if expected_s <= 0 or expected_s / SURPRISE <= elapsed_s <= expected_s * SURPRISE:
            return
        factor = (elapsed_s / expected_s) ** WEIGHT
        self._points = {k: (units, s * factor) for k, (units, s) in self._points.items()}


class CostAware(Admission):
    """Loads all, a part or nothing, whichever is expected to give the earliest first token.

    With k pages loaded the first token is expected after ``question + load(k) + prefill(missing - k
    pages)``. All three are running estimates by size. The policy compares k = 0, all pages, and
    every whole number of reads, since the last, short read may cost as much as a full one. Where
    k = 0 wins, storage is not even asked.

    Estimates may be wrong, so no request waits longer than computing would take: it goes on then
    with what has arrived. What is never loaded is never measured again, so now and then the policy
    makes a load that it does not expect to pay: a *probe*. A probe is made once its expected loss
    fits the budget, which grows by ``PROBE_BUDGET`` of all expected time.
    """

    has_patience: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.load_s = SizedEstimate()
        self.prefill_s = SizedEstimate()
        self._declines = False
        self._budget_s = 0.0
        self._probes: dict[str, int] = {}  # request -> pages

    def is_worth_asking(self, candidate: PrefetchCandidate) -> bool:
        # docstring inherited
        if not (self.load_s.is_known and self.prefill_s.is_known):
            return True
        question_s = self.load_s.latency_s
        load_s = question_s + self.expected_s(candidate, self._best(candidate))
        compute_s = self.expected_s(candidate, 0)
        margin = 1 - MARGIN
        if self._declines:
            self._declines = load_s > compute_s * margin
        else:
            self._declines = load_s * margin > compute_s
        self._budget_s += PROBE_BUDGET * min(load_s, compute_s)
        if not self._declines:
            return True
        n_probe = self._probe(candidate, compute_s - question_s)
        if n_probe:
            self._probes[candidate.request_id] = n_probe
            return True
        self._decide(candidate, 0, "none")
        return False

    def admit(self, candidate: PrefetchCandidate) -> int:
        # docstring inherited
        n_probe = self._probes.pop(candidate.request_id, 0)
        if n_probe:
            return self._decide(candidate, min(candidate.n_found, n_probe), "probe")
        if not self.prefill_s.is_known:
            return self._decide(candidate, min(candidate.n_found, FIRST_PROBE_PAGES), "probe")
        if not self.load_s.is_known:
            return self._decide(candidate, candidate.n_found, "all")
        n = self._best(candidate)
        if self.expected_s(candidate, n) * (1 - MARGIN) > self.expected_s(candidate, 0):
            return self._decide(candidate, 0, "none")
        return self._decide(candidate, n, "all" if n == candidate.n_found else "part")

    def patience_s(self, n_tokens: int) -> float | None:
        # docstring inherited
        return self.prefill_s.predict(n_tokens) if self.prefill_s.is_known else None

    def asked(self, elapsed_s: float) -> None:
        # docstring inherited
        self.load_s.observe_latency(elapsed_s)

    def loaded(self, n_pages: int, elapsed_s: float) -> None:
        # docstring inherited
        self.load_s.observe(n_pages, elapsed_s)

    def prefilled(self, n_tokens: int, elapsed_s: float) -> None:
        # docstring inherited
        self.prefill_s.observe(n_tokens, elapsed_s)

    def expected_s(self, candidate: PrefetchCandidate, n_pages: int) -> float:
        """Expected time from the answer to the first token when ``n_pages`` are loaded."""
        rest = max(1, candidate.n_missing_tokens - n_pages * candidate.page_size)
        return self.load_s.predict(n_pages) + self.prefill_s.predict(rest)

    def _best(self, candidate: PrefetchCandidate) -> int:
        """The number of pages above 0 that is expected to be best."""
        sizes = (
            *range(candidate.batch_pages, candidate.n_found, candidate.batch_pages),
            candidate.n_found,
        )
        best: int = min(sizes, key=lambda n: (self.expected_s(candidate, n), -n))
        return best

    def _probe(self, candidate: PrefetchCandidate, free_s: float) -> int:
        """Pages of a probe, or 0 while the budget does not pay for one.

        It is the largest size that costs no more than computing the request once more, or the
        smallest if none is so cheap.
        """
        sizes = [min(candidate.n_found, FIRST_PROBE_PAGES)]
        while sizes[-1] * GROWTH <= candidate.n_found:
            sizes.append(sizes[-1] * GROWTH)
        losses = {n: self.expected_s(candidate, n) - free_s for n in sizes}
        affordable = [n for n in sizes if losses[n] <= free_s]
        n = affordable[-1] if affordable else sizes[0]
        if losses[n] > self._budget_s:
            return 0
        self._budget_s -= max(losses[n], 0.0)
        return n

    def _decide(self, candidate: PrefetchCandidate, n: int, outcome: str) -> int:
        self.decisions[outcome] += 1
        log.info(
            "request %s: %d of %d pages are loaded (%s)",
            candidate.request_id,
            n,
            candidate.n_found,
            outcome,
        )
        return n
