"""How much of what storage has is worth loading: one small object a policy."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass

from hicache_core.controller.estimates import SizedEstimate

log = logging.getLogger(__name__)

MARGIN = 0.03
"""The other choice must be expected to be better by this share before the policy changes its mind:
estimates are noisy, and to go back and forth costs more than to be a little late."""

PROBE_BUDGET = 0.01
"""Share of all time to first token that may be spent on loads that are not expected to pay."""

FIRST_PROBE_PAGES = 4
"""Pages of a load about whose speed nothing is known."""

GROWTH = 4
"""A load may be this many times larger than the largest that was measured."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What storage has for a request, and what the request lacks.

    Attributes:
        request_id: for the log.
        n_found: leading pages that storage says it has.
        n_missing_tokens: tokens that neither device nor host has.
        page_size: tokens a page.
        page_nbytes: bytes of a page's object.
        batch_pages: pages of one read.
    """

    request_id: str
    n_found: int
    n_missing_tokens: int
    page_size: int
    page_nbytes: int
    batch_pages: int


class Admission(ABC):
    """Decides how many of the offered pages are loaded, and learns from what came of it.

    Owner thread only.

    Attributes:
        decisions: how often each outcome was chosen: ``all``, ``part``, ``none``, ``probe``.
    """

    def __init__(self) -> None:
        self.decisions: Counter[str] = Counter()

    @abstractmethod
    def admit(self, offer: Offer) -> int:
        """Leading pages to load: 0 to ``offer.n_found``."""

    def asked(self, elapsed_s: float) -> None:  # noqa: B027 - some do not learn
        """Storage answered a question in ``elapsed_s``."""

    def loaded(self, n_pages: int, elapsed_s: float) -> None:  # noqa: B027
        """A load of ``n_pages`` took ``elapsed_s``, from the reads' submission to the last page."""

    def prefilled(self, n_tokens: int, elapsed_s: float) -> None:  # noqa: B027
        """The engine computed ``n_tokens`` of a prompt in ``elapsed_s``."""


class AlwaysAdmit(Admission):
    """Loads all that storage has."""

    def admit(self, offer: Offer) -> int:
        # docstring inherited
        self.decisions["all"] += 1
        return offer.n_found


class CostAware(Admission):
    """Loads all, a part or nothing, whichever is expected to give the earliest first token.

    With k pages loaded the first token is expected after ``load(k) + prefill(missing - k pages)``.
    Both are running estimates by size (``SizedEstimate``). Candidates are 0, all, and what whole
    reads bring, since the last, short read may cost as much as a full one.

    What is never loaded is never measured again, so now and then a load that is not expected to
    pay is made all the same: a *probe*, as large as its expected loss fits the budget that
    ``PROBE_BUDGET`` of all expected time has saved up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.load_s = SizedEstimate()
        self.prefill_s = SizedEstimate()
        self._declines = False
        self._budget_s = 0.0

    def admit(self, offer: Offer) -> int:
        # docstring inherited
        if self.load_s.is_known and self.prefill_s.is_known:
            n, outcome = self._weigh(offer)
        else:
            n, outcome = self._trusted(offer), "probe"
        self.decisions[outcome] += 1
        log.info(
            "request %s: storage has %d pages, %d are loaded (%s)",
            offer.request_id,
            offer.n_found,
            n,
            outcome,
        )
        return n

    def asked(self, elapsed_s: float) -> None:
        # docstring inherited
        self.load_s.observe_latency(elapsed_s)

    def loaded(self, n_pages: int, elapsed_s: float) -> None:
        # docstring inherited
        self.load_s.observe(n_pages, elapsed_s)

    def prefilled(self, n_tokens: int, elapsed_s: float) -> None:
        # docstring inherited
        self.prefill_s.observe(n_tokens, elapsed_s)

    def expected_s(self, offer: Offer, n_pages: int) -> float:
        """Expected time to the first token when ``n_pages`` are loaded, in seconds."""
        rest = max(1, offer.n_missing_tokens - n_pages * offer.page_size)
        return self.load_s.predict(n_pages) + self.prefill_s.predict(rest)

    def _trusted(self, offer: Offer) -> int:
        """Pages of a load that is not much larger than what was measured."""
        return min(offer.n_found, max(FIRST_PROBE_PAGES, int(GROWTH * self.load_s.largest)))

    def _weigh(self, offer: Offer) -> tuple[int, str]:
        n_max = self._trusted(offer)
        steps = range(offer.batch_pages, n_max, offer.batch_pages)
        best = min((*steps, n_max), key=lambda n: (self.expected_s(offer, n), -n))
        load_s, compute_s = self.expected_s(offer, best), self.expected_s(offer, 0)
        if self._declines:
            self._declines = load_s > compute_s * (1 - MARGIN)
        else:
            self._declines = load_s * (1 - MARGIN) > compute_s
        if not self._declines:
            self._budget_s += PROBE_BUDGET * load_s
            return best, "all" if best == offer.n_found else "part"
        self._budget_s += PROBE_BUDGET * compute_s
        n_probe = self._probe(offer, compute_s)
        return n_probe, "probe" if n_probe else "none"

    def _probe(self, offer: Offer, compute_s: float) -> int:
        """Pages of a probe, or 0 while the budget does not pay for one.

        The largest size counts that costs no more than computing the request once more; where none
        is so cheap, the smallest.
        """
        sizes = [min(offer.n_found, FIRST_PROBE_PAGES)]
        while sizes[-1] * GROWTH <= self._trusted(offer):
            sizes.append(sizes[-1] * GROWTH)
        losses = {n: self.expected_s(offer, n) - compute_s for n in sizes}
        affordable = [n for n in sizes if losses[n] <= compute_s]
        n = affordable[-1] if affordable else sizes[0]
        if losses[n] > self._budget_s:
            return 0
        self._budget_s -= max(losses[n], 0.0)
        return n
