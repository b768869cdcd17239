"""Why was this a miss? Where a request's tokens came from, and why the others were computed."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from hicache_core.controller.prefetch_record import Shortfall
from hicache_core.kv.keys import DIGEST_NBYTES
from hicache_core.observe.journal import Journal, PageRun
from hicache_core.types import Namespace, Tier

MAX_REQUESTS = 1024
MAX_GHOST_PAGES = 65_536
MAX_UNIT_GHOSTS = 4096
MAX_FIRST_PAGES = 4096
MAX_NAMESPACES_A_PAGE = 4


class Reason(enum.Enum):
    """Why tokens were computed that might have been cached."""

    NONE = "none"  # only the tail after the last whole page was missed, which is always computed
    TOO_SHORT = "too_short"  # shorter than a page, and only whole pages are cached
    NEVER_SEEN = "never_seen"  # as far as this process remembers
    NEW_PART = "new_part"  # never seen, after a prefix that was found
    EVICTED = "evicted"  # it was cached, and left; the detail says when and from which tier
    NOT_DURABLE = "not_durable"  # it left before storage had it
    BELOW_THRESHOLD = "below_threshold"  # too few tokens to ask storage for, or too few found
    DEADLINE = "deadline"  # storage was too slow
    DECLINED = "declined"  # loading was expected to take longer than computing
    BREAKER_OPEN = "breaker_open"  # the store failed before, so its breaker keeps questions away
    STORAGE_ERROR = "storage_error"  # the store failed
    CORRUPT = "corrupt"  # the stored page was not valid
    VANISHED = "vanished"  # storage said it had the page, and then did not deliver it
    NO_ROOM = "no_room"  # no host page was free for it
    OTHER_NAMESPACE = "other_namespace"  # cached for another tenant, key or adapter
    CUT_BY_GROUP = "cut_by_group"  # its pages are there, the units of a group are not


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of a request's prompt. The tokens of the tiers and the missed add up to all.

    Attributes:
        request_id: of the request.
        n_tokens: tokens of the prompt.
        device_tokens: found on the device.
        host_tokens: found on the host, without ``storage_tokens``.
        storage_tokens: delivered by storage for this request.
        missed_tokens: computed.
        reason: why the first missed page was missed; the pages after it follow from that.
        detail: the reason in words; may be empty.
        at_s: when it was matched, by the cache's clock.
        cut_by: the group of layers whose missing units made the match shorter; empty if none.
        uncut_tokens: tokens that the full pages alone would have given, if a group cut them short.
    """

    request_id: str
    n_tokens: int
    device_tokens: int
    host_tokens: int
    storage_tokens: int
    missed_tokens: int
    reason: Reason
    detail: str
    at_s: float
    cut_by: str = ""
    uncut_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As a dict that JSON can hold."""
        return {**asdict(self), "reason": self.reason.value}


class Hits(NamedTuple):
    """Tokens of a prompt: on the device, on the host (storage's included), and all of them."""

    device: int
    host: int
    all: int


class Cut(NamedTuple):
    """A match that is shorter than its full pages: the group whose units lack, and their tokens."""

    group: str
    n_uncut_tokens: int


@dataclass(frozen=True, slots=True)
class _Ghost:
    """A run of pages that has left a tier, by digests; ``number`` counts the runs before it."""

    number: int
    digests: bytes
    at_s: float
    tier: Tier
    cause: str
    stored: bool

    def holds(self, page: bytes) -> bool:
        """Whether the page with that digest was among them."""
        return self.digests.find(page) % DIGEST_NBYTES == 0  # -1 where it is not


class _Missed(NamedTuple):
    """The first page that a request missed.

    Attributes:
        page: its digest.
        start: number of its first token.
        others: fields in which another namespace that has this prompt differs.
        n_left: runs that had left by then; one that left later cannot be the reason.
        cut: the page is there, but a group lacks units that one needs to go on after it.
    """

    page: bytes
    start: int
    others: tuple[str, ...]
    n_left: int
    cut: Cut | None = None

    def why_unknown(self) -> tuple[Reason, str]:
        """Why the page was missed, if nothing is remembered of it."""
        if self.others:
            named = " and ".join(self.others)
            return Reason.OTHER_NAMESPACE, f"it is cached with another {named}"
        if self.start:
            return Reason.NEW_PART, f"the new part, from token {self.start}"
        return Reason.NEVER_SEEN, ""


class Explainer(Journal):
    """Remembers what left, what storage answered and what requests saw, in bounded memory.

    Owner thread only, but any thread may ask ``explain``. It is a journal, so it is told of every
    page that leaves a tier.

    Attributes:
        missed_tokens: computed tokens since the start, by the reason known at the match.
    """

    hears_gains = False

    def __init__(self, clock: Callable[[], float]) -> None:
        self.missed_tokens = Counter({reason.value: 0 for reason in Reason})
        self._clock = clock
        self._requests: OrderedDict[str, Explanation] = OrderedDict()
        self._answers: OrderedDict[str, Shortfall] = OrderedDict()
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._ghosts: OrderedDict[int, _Ghost] = OrderedDict()  # by number
        self._newest: dict[bytes, _Ghost] = {}  # of them by their first page
        self._unit_ghosts: deque[tuple[str, _Ghost]] = deque(maxlen=MAX_UNIT_GHOSTS)
        self._n_left = 0
        self._n_ghost_pages = 0
        self._open: OrderedDict[str, _Missed] = (
            OrderedDict()
        )  # whose reason may still become better known
        self._first_pages: OrderedDict[bytes, list[Namespace]] = OrderedDict()

    # What it is told.

    def stored(self, tier: Tier, run: PageRun) -> None:
        # docstring inherited: the tree finds pages that came back, so their ghosts may stay
        pass

    def removed(self, tier: Tier, run: PageRun, cause: str) -> None:
        # docstring inherited; one entry per run
        ghost = _Ghost(self._n_left, run.digests, self._clock(), tier, cause, run.stored)
        self._n_left += 1
        if run.group is not None:
            self._unit_ghosts.append((run.group.name, ghost))
            return
        self._ghosts[ghost.number] = ghost
        self._newest[run.digests[:DIGEST_NBYTES]] = ghost
        self._n_ghost_pages += len(run.digests) // DIGEST_NBYTES
        while self._n_ghost_pages > MAX_GHOST_PAGES:
            gone = self._ghosts.popitem(last=False)[1]
            self._n_ghost_pages -= len(gone.digests) // DIGEST_NBYTES
            first = gone.digests[:DIGEST_NBYTES]
            if self._newest[first] is gone:
                del self._newest[first]

    def cleared(self) -> None:
        # docstring inherited: why pages left before stays true
        pass

    def prefetched(self, request_id: str, shortfall: Shortfall) -> None:
        """Says why storage did not deliver everything for a request."""
        _keep(self._answers, request_id, shortfall, MAX_REQUESTS)

    def delivered(self, request_id: str, n_tokens: int) -> None:
        """Says that storage delivered ``n_tokens`` for a request."""
        _keep(self._loaded, request_id, n_tokens, MAX_REQUESTS)

    def matched(
        self,
        request_id: str,
        hits: Hits,
        missed_page: Callable[[], bytes] | None,
        first_page: bytes | None,
        namespace: Namespace,
        cut: Cut | None = None,
    ) -> None:
        """Records a match, and decides why the first missed page was missed.

        Args:
            request_id: of the request.
            hits: where its tokens were found.
            missed_page: digest of the first missed page; None if no whole page was missed.
            first_page: digest of the prompt's first page as the default namespace has it; empty
                for a prompt shorter than a page; None if nothing was looked up.
            namespace: the request's.
            cut: the group that made the match shorter; None if none did.
        """
        answer = self._answers.pop(request_id, None)
        loaded = min(self._loaded.pop(request_id, 0), hits.host)
        reason, detail = Reason.NONE, ""
        n_hit = hits.device + hits.host
        if first_page == b"":
            reason, detail = Reason.TOO_SHORT, "it has no whole page to look for"
        elif first_page and missed_page is not None:
            others = () if n_hit else self._others(first_page, namespace)
            missed_first = _Missed(missed_page(), n_hit, others, self._n_left, cut)
            ghost = self._newest.get(missed_first.page)
            reason, detail = self._why(answer, ghost, missed_first, self._clock())
            if reason in _MAY_BECOME_BETTER_KNOWN:
                _keep(self._open, request_id, missed_first, MAX_REQUESTS)
        if first_page:
            self._note(first_page, namespace)
        missed = hits.all - hits.device - hits.host
        self.missed_tokens[reason.value] += missed
        explanation = Explanation(
            request_id,
            hits.all,
            hits.device,
            hits.host - loaded,
            loaded,
            missed,
            reason,
            detail,
            self._clock(),
            *(cut or ()),
        )
        _keep(self._requests, request_id, explanation, MAX_REQUESTS)

    def storage_had_nothing(self, request_id: str) -> None:
        """Storage answered late, and had nothing: waiting would not have helped."""
        found, missed = self._requests.get(request_id), self._open.get(request_id)
        if found is None or missed is None or found.reason is not Reason.DEADLINE:
            return
        ghost = self._newest.get(missed.page)
        if ghost is not None and ghost.number >= missed.n_left:
            ghost = None
        reason, detail = self._why(Shortfall("absent"), ghost, missed, found.at_s)
        self._requests[request_id] = replace(found, reason=reason, detail=detail)

    # What it says.

    def explain(self, request_id: str) -> Explanation | None:
        """The last record of a request; None if it was never matched, or too long ago.

        Pages that left in the middle of a longer run are searched only now, since most requests are
        never explained.
        """
        found, missed = self._requests.get(request_id), self._open.get(request_id)
        if found is None or missed is None:
            return found
        if found.reason is Reason.CUT_BY_GROUP:
            return self._with_lost_units(found, missed)
        if found.reason not in (Reason.NEVER_SEEN, Reason.NEW_PART):
            return found
        ghosts = list(self._ghosts.values())  # one step: any thread may ask
        before = (ghost for ghost in reversed(ghosts) if ghost.number < missed.n_left)
        ghost = next((ghost for ghost in before if ghost.holds(missed.page)), None)
        if ghost is None:
            return found
        reason, detail = self._why(None, ghost, missed, found.at_s)
        return replace(found, reason=reason, detail=detail)

    def _with_lost_units(self, found: Explanation, missed: _Missed) -> Explanation:
        """Adds when the units left that cut a match short, as far as that is remembered."""
        for group, ghost in reversed(list(self._unit_ghosts)):
            is_it = group == found.cut_by and ghost.number < missed.n_left
            if is_it and ghost.holds(missed.page):
                left = _left(ghost, found.at_s)
                return replace(found, detail=f"{found.detail}; {left}")
        return found

    @property
    def request_ids(self) -> list[str]:
        """Requests that can be explained, the oldest first."""
        return list(self._requests)

    @staticmethod
    def _why(
        answer: Shortfall | None, ghost: _Ghost | None, missed: _Missed, at_s: float
    ) -> tuple[Reason, str]:
        """Why a page was missed at ``at_s``, by the answer of storage and the page's ghost."""
        asked = answer is not None and answer.reason != "no_storage"
        if answer is not None and answer.reason not in ("absent", "no_storage", "below_threshold"):
            return Reason(answer.reason), answer.detail
        if missed.cut is not None:
            group, n_uncut = missed.cut
            return Reason.CUT_BY_GROUP, (
                f"cut by group {group!r}: the full pages are there up to token {n_uncut}, the "
                "units that the group needs there are not"
            )
        too_short = answer is not None and answer.reason == "below_threshold"
        if ghost is not None and not (too_short and ghost.stored):
            left = _left(ghost, at_s)
            if asked and not ghost.stored:
                return Reason.NOT_DURABLE, f"{left}, before storage had it"
            return Reason.EVICTED, f"{left}, and storage does not have it" if asked else left
        if too_short:
            assert answer is not None
            return Reason.BELOW_THRESHOLD, answer.detail
        return missed.why_unknown()

    def _others(self, first_page: bytes, namespace: Namespace) -> tuple[str, ...]:
        """The fields in which another namespace that had this first page differs from this one."""
        others = [n for n in self._first_pages.get(first_page, ()) if n != namespace]
        if not others:
            return ()
        other = others[-1]
        names = [field.name for field in fields(Namespace)]
        return tuple(n for n in names if getattr(other, n) != getattr(namespace, n))

    def _note(self, first_page: bytes, namespace: Namespace) -> None:
        known = self._first_pages.get(first_page, [])
        if namespace not in known:
            known = [*known[1 - MAX_NAMESPACES_A_PAGE :], namespace]
        _keep(self._first_pages, first_page, known, MAX_FIRST_PAGES)


_MAY_BECOME_BETTER_KNOWN = (
    Reason.NEVER_SEEN,
    Reason.NEW_PART,
    Reason.DEADLINE,
    Reason.CUT_BY_GROUP,
)


def _left(ghost: _Ghost, at_s: float) -> str:
    age_s = at_s - ghost.at_s
    return f"it left the {ghost.tier.value} {age_s:.1f} s before ({ghost.cause})"


def _keep(memory: OrderedDict[Any, Any], key: object, value: object, limit: int) -> None:
    """Adds a value as the newest, and drops the oldest beyond ``limit``."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > limit:
        memory.popitem(last=False)
