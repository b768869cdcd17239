"""A circuit breaker: a store that fails, hangs or is slow is only called now and then."""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hicache_core.storage.guard.config import GuardConfig

N_BUCKETS = 10
"""The window slides in steps of a tenth of its length."""

NEVER = float("inf")


class BreakerState(enum.StrEnum):
    """Which calls the breaker lets through."""

    CLOSED = "closed"  # all of them
    OPEN = "open"  # none
    HALF_OPEN = "half_open"  # a few probes, whose outcome decides


class CallOutcome(enum.Enum):
    """What the outcome of a call says about the store."""

    OK = enum.auto()  # it answers; "not there" and "full" are answers
    FAILED = enum.auto()  # it could not answer
    TIMED_OUT = enum.auto()  # it did not answer in time
    NOTHING = enum.auto()  # neither a fault of the store nor a sign that it works


@dataclass(slots=True)
class Ticket:
    """A call that has not returned.

    Attributes:
        operation: its name, for messages.
        start_s: when it started.
        slow_at_s: it is slow if it ends later.
        due_s: it hangs if it has not ended by then.
        epoch: number of state changes when it started; its outcome is ignored after a later one.
        probe: whether it is a probe of a half-open breaker.
        hangs: whether it was found past ``due_s``.
    """

    operation: str
    start_s: float
    slow_at_s: float
    due_s: float
    epoch: int
    probe: bool
    hangs: bool = False


@dataclass(frozen=True, slots=True)
class BreakerView:
    """A snapshot of the breaker.

    Attributes:
        state: closed, open or half open.
        since_s: seconds since it entered that state.
        last_error: the last failure; empty if there was none.
        next_probe_s: seconds until the next probe; 0 unless open.
        n_in_flight: calls that have not returned.
        n_hanging: those of them that were found past their limit.
        changes: how often it entered each state.
    """

    state: BreakerState
    since_s: float
    last_error: str
    next_probe_s: float
    n_in_flight: int
    n_hanging: int
    changes: Mapping[str, int]


@dataclass(slots=True)
class _Bucket:
    """Counts of the calls that ended in one tenth of the window."""

    number: int
    n_calls: int = 0
    n_failed: int = 0
    n_slow: int = 0


class CircuitBreaker:
    """Opens when too many calls fail or are slow, or when one hangs while none succeeds.

    A call that has not returned by its limit counts as a failure as soon as another call begins. So
    a store that hangs opens the breaker although no thread has returned from it. If no call has
    succeeded since the hanging one began, the breaker opens at once: a dead store costs one
    deadline instead of ``min_calls`` deadlines. A call that raised ``BackendTimeout`` is treated in
    the same way.

    After ``open_s`` the next ``half_open_probes`` calls are probes. If all of them succeed in time
    the breaker closes. If one fails, is slow or hangs, it opens again for twice as long.

    Threads: any thread may call any method; none blocks.
    """

    def __init__(self, config: GuardConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._bucket_s = config.window_s / N_BUCKETS
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._changed_at_s = clock()
        self._epoch = 0
        self._changes = {state.value: 0 for state in BreakerState}
        self._buckets: deque[_Bucket] = deque()
        self._in_flight: dict[int, Ticket] = {}
        self._next_due_s = NEVER  # no running call is due earlier
        self._last_success_s = -NEVER
        self._last_error = ""
        self._n_opened = 0  # since it was last closed
        self._open_until_s = 0.0
        self._n_probes = 0  # running
        self._n_good_probes = 0

    def enter(self, operation: str, slow_s: float, allowed_s: float) -> Ticket | None:
        """Begins a call.

        Args:
            operation: its name, for messages.
            slow_s: the call is slow if it takes longer.
            allowed_s: the call hangs if it takes longer.

        Returns:
            A ticket for ``leave``; None if the call must not be made.
        """
        with self._lock:
            now = self._clock()
            if now >= self._next_due_s:
                self._find_hanging(now)
            if self._state is not BreakerState.CLOSED and not self._may_probe(now):
                return None
            probe = self._state is BreakerState.HALF_OPEN
            self._n_probes += probe
            due_s = now + allowed_s
            ticket = Ticket(operation, now, now + slow_s, due_s, self._epoch, probe)
            self._in_flight[id(ticket)] = ticket
            self._next_due_s = min(self._next_due_s, due_s)
            return ticket

    def leave(self, ticket: Ticket, outcome: CallOutcome, error: str = "") -> None:
        """Ends a call that ``enter`` began; every one must end exactly once.

        Args:
            ticket: of the call.
            outcome: what it says about the store.
            error: the failure, for messages; empty if there was none.
        """
        with self._lock:
            now = self._clock()
            del self._in_flight[id(ticket)]
            if outcome is CallOutcome.OK:
                self._last_success_s = now
            elif error:
                self._last_error = error
            if ticket.epoch != self._epoch or ticket.hangs:
                return
            if ticket.probe:
                self._n_probes -= 1
            if outcome is not CallOutcome.NOTHING:
                self._judge(ticket, outcome, now)

    def admits(self, ticket: Ticket) -> bool:
        """Returns whether a call may be retried: the state has not changed since it began."""
        with self._lock:
            return ticket.epoch == self._epoch and not ticket.hangs

    def view(self) -> BreakerView:
        """Returns a snapshot; changes nothing."""
        with self._lock:
            now = self._clock()
            is_open = self._state is BreakerState.OPEN
            return BreakerView(
                self._state,
                now - self._changed_at_s,
                self._last_error,
                max(0.0, self._open_until_s - now) if is_open else 0.0,
                len(self._in_flight),
                sum(ticket.hangs for ticket in self._in_flight.values()),
                dict(self._changes),
            )

    # From here on the caller holds the lock.

    def _find_hanging(self, now: float) -> None:
        """Counts calls that have not returned by their limit as failures."""
        for ticket in self._in_flight.values():
            if ticket.due_s > now or ticket.hangs:
                continue
            ticket.hangs = True
            if ticket.epoch == self._epoch:
                elapsed_s = now - ticket.start_s
                self._last_error = f"{ticket.operation} has not returned for {elapsed_s:.1f} s"
                self._judge(ticket, CallOutcome.TIMED_OUT, now)
        due = (ticket.due_s for ticket in self._in_flight.values() if not ticket.hangs)
        self._next_due_s = min(due, default=NEVER)

    def _may_probe(self, now: float) -> bool:
        """Returns whether a call may be a probe; half-opens a breaker whose time is over."""
        if self._state is BreakerState.OPEN:
            if now < self._open_until_s:
                return False
            self._change(BreakerState.HALF_OPEN, now)
        return self._n_probes + self._n_good_probes < self._config.half_open_probes

    def _judge(self, ticket: Ticket, outcome: CallOutcome, now: float) -> None:
        """Counts an outcome, and opens or closes the breaker if it must."""
        failed, slow = outcome is not CallOutcome.OK, now > ticket.slow_at_s
        if ticket.probe:
            if failed or slow:
                self._open(now)
            else:
                self._n_good_probes += 1
                if self._n_good_probes >= self._config.half_open_probes:
                    self._n_opened = 0
                    self._change(BreakerState.CLOSED, now)
            return
        self._count(failed=failed, slow=slow, now=now)
        timed_out = outcome is CallOutcome.TIMED_OUT or (failed and now >= ticket.due_s)
        alone = timed_out and self._last_success_s <= ticket.start_s
        if alone or ((failed or slow) and self._is_bad(now)):
            self._open(now)

    def _count(self, *, failed: bool, slow: bool, now: float) -> None:
        number = int(now // self._bucket_s)
        if not self._buckets or self._buckets[-1].number != number:
            self._buckets.append(_Bucket(number))
            while self._buckets[0].number <= number - N_BUCKETS:
                self._buckets.popleft()
        bucket = self._buckets[-1]
        bucket.n_calls += 1
        bucket.n_failed += failed
        bucket.n_slow += slow

    def _is_bad(self, now: float) -> bool:
        """Returns whether too many calls of the window failed or were slow."""
        oldest = int(now // self._bucket_s) - N_BUCKETS
        recent = [bucket for bucket in self._buckets if bucket.number > oldest]
        n_calls = sum(bucket.n_calls for bucket in recent)
        if n_calls < self._config.min_calls:
            return False
        n_failed = sum(bucket.n_failed for bucket in recent)
        n_slow = sum(bucket.n_slow for bucket in recent)
        config = self._config
        return n_failed >= config.error_rate * n_calls or n_slow >= config.slow_rate * n_calls

    def _open(self, now: float) -> None:
        doublings = min(self._n_opened, 64)  # 2**64 times open_s is above any limit
        open_s = min(self._config.open_s * 2.0**doublings, self._config.max_open_s)
        self._n_opened += 1
        self._open_until_s = now + open_s
        self._change(BreakerState.OPEN, now)

    def _change(self, state: BreakerState, now: float) -> None:
        self._state = state
        self._changed_at_s = now
        self._changes[state.value] += 1
        self._epoch += 1
        self._buckets.clear()
        self._n_probes = self._n_good_probes = 0
