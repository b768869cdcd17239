"""The guard in front of a backend: circuit breaker, retries, failed keys and call statistics."""

from __future__ import annotations

import itertools
import operator
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from hicache_core.errors import (
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    BreakerOpen,
    UseAfterClose,
)
from hicache_core.storage.base import Buffer, StorageBackend
from hicache_core.storage.guard.breaker import BreakerState, CallOutcome, CircuitBreaker, Ticket
from hicache_core.storage.guard.call_recorder import CallRecorder, OperationStatus
from hicache_core.storage.guard.capabilities import ADAPTERS
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.guard.failed_keys import FailedKeys
from hicache_core.storage.segments import nbytes_of
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import Page

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GuardStatus:
    """What a guard has measured since it was made.

    Attributes:
        backend: name of the guarded backend.
        state: of the breaker.
        since_s: seconds since the breaker entered that state.
        last_error: the last failure; empty if there was none.
        next_probe_s: seconds until an open breaker lets a probe through; else 0.
        n_in_flight: calls that have not returned.
        n_hanging: those of them that were found past their limit.
        state_changes: how often the breaker entered each state.
        operations: histograms of exists, get, set, delete, and of every other operation called.
        errors: how often each operation raised each class of exception, retries included.
        retries: calls that were repeated.
        short_circuits: calls that the breaker refused.
        negative_hits: pages that were not looked up, since their load or that of a page before
            them had failed.
        negative_keys: keys that are remembered as failed.
    """

    backend: str
    state: BreakerState
    since_s: float
    last_error: str
    next_probe_s: float
    n_in_flight: int
    n_hanging: int
    state_changes: Mapping[str, int]
    operations: Mapping[str, OperationStatus]
    errors: Mapping[tuple[str, str], int]
    retries: int
    short_circuits: int
    negative_hits: int
    negative_keys: int


class GuardedBackend(BackendWrapper):
    """Limits what a backend can cost that fails, hangs or is slow.

    - An open breaker raises ``BreakerOpen`` at once; see ``CircuitBreaker``.
    - ``BackendUnavailable`` and ``BackendTimeout`` are retried after a random pause, while another
      attempt as long as the last one still fits into the time limit of the call.
    - A key whose load failed counts as absent for ``negative_ttl_s``, or until it is stored or
      loaded through this guard. A load that the breaker refused does not count as failed. Of a
      failed ``batch_get`` that is the first key, of a failed ``get_each`` every key.
    - ``list_keys``, ``clear``, ``pin`` and ``usage`` are refused and measured in the same way, but
      never retried, and the breaker ignores their outcome: they may take long in a healthy store.
      ``stats``, ``diagnose`` and ``flush`` pass through.

    The time limit of a batch follows from the length of its first page times the number of pages.

    Threads: as the guarded backend. The guard itself blocks only for the pause before a retry.
    """

    adapters = ADAPTERS

    def __init__(
        self,
        inner: StorageBackend,
        config: GuardConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        """Wraps ``inner``, which need not be open yet.

        Args:
            inner: the backend, already sealed.
            config: settings of the guard; the attribute ``config`` remains that of ``inner``.
            clock: seconds; only differences count.
            sleep: blocks for the given number of seconds.
            rng: draws the pauses before retries.
        """
        super().__init__(inner)
        self.guard_config = config
        self._hang_limits = config.hang_limits
        self._slow_limits = config.slow_limits
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._breaker = CircuitBreaker(config, clock)
        self._calls = CallRecorder()
        self._failed = FailedKeys(config.negative_ttl_s, config.negative_max_keys, clock)
        self._lock = threading.Lock()
        self._n_retries = 0
        self._n_short_circuits = 0
        self._n_negative_hits = 0

    def status(self) -> GuardStatus:
        """Returns a snapshot of the measurements. Cheap; any thread; does not call the store."""
        view = self._breaker.view()
        with self._lock:
            retries, short, negative = (
                self._n_retries,
                self._n_short_circuits,
                self._n_negative_hits,
            )
        return GuardStatus(
            backend=self.name,
            state=view.state,
            since_s=view.since_s,
            last_error=view.last_error,
            next_probe_s=view.next_probe_s,
            n_in_flight=view.n_in_flight,
            n_hanging=view.n_hanging,
            state_changes=view.changes,
            operations=self._calls.operations(),
            errors=self._calls.errors(),
            retries=retries,
            short_circuits=short,
            negative_hits=negative,
            negative_keys=len(self._failed),
        )

    def get(self, key: str) -> Buffer | None:
        try:
            value = self._guarded("get", self.context.object_nbytes, self.inner.get, key)
        except Exception as exc:  # only inspected; raised again
            if _is_failed_load(exc):
                self._failed.remember([key])
            raise
        if value is None:
            self._failed.remember([key])
        else:
            self._failed.forget([key])
            self._calls.moved("get", memoryview(value).nbytes)
        return value

    def exists(self, key: str) -> bool:
        if self._n_good([key]) == 0:
            return False
        return self._guarded("exists", 0, self.inner.exists, key)

    def set(self, key: str, value: Buffer) -> None:
        nbytes = memoryview(value).nbytes
        self._guarded("set", nbytes, self.inner.set, key, value)
        self._failed.forget([key])
        self._calls.moved("set", nbytes)

    def delete(self, keys: Sequence[str]) -> None:
        self._guarded("delete", 0, self.inner.delete, keys)

    def batch_exists(self, keys: Sequence[str]) -> int:
        n_good = self._n_good(keys)
        if n_good < len(keys):
            if n_good == 0:
                return 0
            keys = keys[:n_good]
        return self._guarded("exists", 0, self.inner.batch_exists, keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        page_nbytes = nbytes_of(pages[0]) if pages else 0
        nbytes = page_nbytes * len(pages)
        start_s = self._clock()
        try:
            n = self._guarded("get", nbytes, self.inner.batch_get, keys, pages)
        except Exception as exc:  # only inspected; raised again
            if keys and _is_failed_load(exc):
                self._failed.remember(keys[:1])
            raise
        self._failed.forget(itertools.islice(keys, max(0, n)))
        if 0 <= n < len(keys):
            self._failed.remember(keys[n : n + 1])
        self._calls.moved_batch("get", n, page_nbytes * n, self._clock() - start_s)
        return n

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        page_nbytes = nbytes_of(pages[0]) if pages else 0
        nbytes = page_nbytes * len(pages)
        start_s = self._clock()
        n = self._guarded("set", nbytes, self.inner.batch_set, keys, pages)
        self._failed.forget(itertools.islice(keys, max(0, n)))
        self._calls.moved_batch("set", n, page_nbytes * n, self._clock() - start_s)
        return n

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        failed = self._failed.among(keys)
        if not failed:
            return self._guarded("exists", 0, self.inner.exists_each, keys)
        asked = [key for key in keys if key not in failed]
        with self._lock:
            self._n_negative_hits += len(keys) - len(asked)
        answers = self._guarded("exists", 0, self.inner.exists_each, asked) if asked else ()
        present = dict(zip(asked, answers, strict=True))
        return [present.get(key, False) for key in keys]

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        page_nbytes = nbytes_of(pages[0]) if pages else 0
        start_s = self._clock()
        try:
            mask = self._guarded("get", page_nbytes * len(pages), self.inner.get_each, keys, pages)
        except Exception as exc:  # only inspected; raised again
            if _is_failed_load(exc):
                self._failed.remember(keys)
            raise
        self._failed.remember(itertools.compress(keys, map(operator.not_, mask)))
        self._failed.forget(itertools.compress(keys, mask))
        n = sum(mask)
        self._calls.moved_batch("get", n, page_nbytes * n, self._clock() - start_s)
        return mask

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        page_nbytes = nbytes_of(pages[0]) if pages else 0
        nbytes = page_nbytes * len(pages)
        start_s = self._clock()
        mask = self._guarded("set", nbytes, self.inner.set_each, keys, pages)
        self._failed.forget(itertools.compress(keys, mask))
        n = sum(mask)
        self._calls.moved_batch("set", n, page_nbytes * n, self._clock() - start_s)
        return mask

    def call_unjudged(
        self, operation: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Makes a call outside the way of a page: measured, but ignored by the breaker.

        Args:
            operation: its name in the statistics.
            call: what to call.
            *args: its arguments.
            **kwargs: its arguments.

        Raises:
            BreakerOpen: the breaker is open and its next probe is not due.
        """
        if self._breaker.view().next_probe_s > 0:
            raise self._short_circuit()
        start_s = self._clock()
        try:
            return call(*args, **kwargs)
        except BaseException as exc:
            self._calls.failed(operation, type(exc).__name__)
            raise
        finally:
            self._calls.took(operation, self._clock() - start_s)

    def _n_good(self, keys: Sequence[str]) -> int:
        """Returns how many leading keys are not remembered as failed; counts the others."""
        n_good = self._failed.n_leading_good(keys)
        if n_good < len(keys):
            with self._lock:
                self._n_negative_hits += len(keys) - n_good
        return n_good

    def _guarded(
        self,
        operation: str,
        nbytes: int,
        call: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Makes a call that moves at most ``nbytes``, with retries, unless the breaker is open."""
        allowed_s = self._hang_limits.for_nbytes(nbytes)
        ticket = self._breaker.enter(operation, self._slow_limits.for_nbytes(nbytes), allowed_s)
        if ticket is None:
            raise self._short_circuit()
        start_s = ticket.start_s
        for attempt in range(self.guard_config.retries + 1):
            try:
                answer = call(*args, **kwargs)
            except BaseException as exc:
                now = self._clock()
                self._calls.took(operation, now - start_s)
                self._calls.failed(operation, type(exc).__name__)
                pause_s = self._pause_s(attempt)
                spent_s = now - ticket.start_s + pause_s + (now - start_s)
                if spent_s > allowed_s or not self._may_retry(exc, attempt, ticket):
                    self._breaker.leave(ticket, _outcome(exc), f"{type(exc).__name__}: {exc}")
                    raise
            else:
                self._calls.took(operation, self._clock() - start_s)
                self._breaker.leave(ticket, CallOutcome.OK)
                return answer
            with self._lock:
                self._n_retries += 1
            self._sleep(pause_s)
            start_s = self._clock()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _pause_s(self, attempt: int) -> float:
        """Returns the pause before a retry in seconds: random, up to a limit that doubles."""
        config = self.guard_config
        limit_s = min(config.retry_max_s, config.retry_base_s * 2.0**attempt)
        return self._rng.uniform(0, limit_s)

    def _may_retry(self, exc: BaseException, attempt: int, ticket: Ticket) -> bool:
        """Returns whether the failure may be transient and the breaker has not changed since."""
        transient = isinstance(exc, BackendUnavailable | BackendTimeout)
        if not transient or isinstance(exc, BreakerOpen) or ticket.probe:
            return False
        return attempt < self.guard_config.retries and self._breaker.admits(ticket)

    def _short_circuit(self) -> BreakerOpen:
        """Counts a refused call; returns the error to raise."""
        with self._lock:
            self._n_short_circuits += 1
        view = self._breaker.view()
        probe = f"the next probe is due in {view.next_probe_s:.1f} s"
        if view.state is not BreakerState.OPEN:
            probe = "a probe is running"
        return BreakerOpen(
            f"backend {self.name} is not called: its breaker has been {view.state.value} for "
            f"{view.since_s:.1f} s; the last error was {view.last_error!r}; {probe}"
        )


def _outcome(exc: BaseException) -> CallOutcome:
    """Returns what an exception says about the store."""
    if isinstance(exc, BackendFull):
        return CallOutcome.OK
    if isinstance(exc, NotImplementedError | UseAfterClose) or not isinstance(exc, Exception):
        return CallOutcome.NOTHING
    return CallOutcome.TIMED_OUT if isinstance(exc, BackendTimeout) else CallOutcome.FAILED


def _is_failed_load(exc: Exception) -> bool:
    """Returns whether the store was called and failed; it was not if a breaker is open."""
    return not isinstance(exc, BreakerOpen) and _outcome(exc) is not CallOutcome.NOTHING
