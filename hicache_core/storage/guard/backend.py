"""The guard before a backend: breaker, retries, failed keys, and figures of all calls."""

from __future__ import annotations

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
from hicache_core.storage.guard.breaker import BreakerState, CircuitBreaker, Ticket, Verdict
from hicache_core.storage.guard.capabilities import ADAPTERS
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.guard.failed_keys import FailedKeys
from hicache_core.storage.guard.latency import CallRecorder, OperationStatus
from hicache_core.storage.segments import nbytes_of
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import Page

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GuardStatus:
    """What a guard has seen since it was made.

    Attributes:
        backend: name of the backend behind it.
        state: of the breaker.
        since_s: seconds since the breaker came into that state.
        last_error: the failure that was seen last; empty if there was none.
        next_probe_s: seconds until an open breaker lets a probe through; else 0.
        n_in_flight: calls under way.
        n_hanging: those of them that were found beyond their deadline.
        state_changes: how often the breaker came into each state.
        operations: histograms of exists, get, set, delete, and what else was called.
        errors: how often each operation raised each class of exception, retries included.
        retries: calls that were repeated.
        short_circuits: calls that the breaker did not let through.
        negative_hits: pages not asked for, from the first on whose load had failed.
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
    """Keeps a backend that fails, hangs or crawls from costing more than it must.

    - An open breaker raises ``BreakerOpen`` at once; see ``CircuitBreaker``.
    - ``BackendUnavailable`` and ``BackendTimeout`` are retried with full jitter while another
      attempt as long as the last one still fits into the time that the call has.
    - A key whose load failed counts as absent for ``negative_ttl_s``, or until it is stored or
      loaded again through this guard. A load that the breaker refused is no failed load.

    - ``list_keys``, ``clear``, ``pin`` and ``usage`` are refused and counted likewise, but neither
      repeated nor judged: they may take long in a store that is well. ``stats``, ``diagnose`` and
      ``flush`` pass through.

    The time of a batch is that of its first page times their number: pages of one batch are taken
    to be equally long.

    Threads: as those of the backend inside; the guard adds no waiting but the pause of a retry.
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
        """Makes the guard of a backend that need not be open yet.

        Args:
            inner: the backend, sealed already.
            config: the settings of this guard; ``config`` of the object stays that of ``inner``.
            clock: seconds; only differences count.
            sleep: waits for so many seconds.
            rng: draws the pauses of retries.
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
        """The figures as of now. Cheap; any thread may ask; the store is not asked."""
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
        except Exception as exc:  # whatever it is: looked at, and raised again
            if _is_failed_load(exc):
                self._failed.remember(key)
            raise
        if value is None:
            self._failed.remember(key)
        else:
            self._failed.forget([key], 1)
            self._calls.moved("get", memoryview(value).nbytes)
        return value

    def exists(self, key: str) -> bool:
        if self._n_good([key]) == 0:
            return False
        return self._guarded("exists", 0, self.inner.exists, key)

    def set(self, key: str, value: Buffer) -> None:
        nbytes = memoryview(value).nbytes
        self._guarded("set", nbytes, self.inner.set, key, value)
        self._failed.forget([key], 1)
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
        try:
            n = self._guarded("get", nbytes, self.inner.batch_get, keys, pages)
        except Exception as exc:  # whatever it is: looked at, and raised again
            if keys and _is_failed_load(exc):
                self._failed.remember(keys[0])
            raise
        self._failed.forget(keys, n)
        if 0 <= n < len(keys):
            self._failed.remember(keys[n])
        self._calls.moved("get", page_nbytes * n)
        return n

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        page_nbytes = nbytes_of(pages[0]) if pages else 0
        nbytes = page_nbytes * len(pages)
        n = self._guarded("set", nbytes, self.inner.batch_set, keys, pages)
        self._failed.forget(keys, n)
        self._calls.moved("set", page_nbytes * n)
        return n

    def aside(self, operation: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes a call that is no request's, unless the breaker is open, and does not judge by it.

        Raises:
            BreakerOpen: the breaker is open, and not yet due for a probe.
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
        """How many leading keys have not failed to load."""
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
        """Makes a call of at most ``nbytes``, once or more often, unless the breaker is open."""
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
                    self._breaker.leave(ticket, _verdict(exc), f"{type(exc).__name__}: {exc}")
                    raise
            else:
                self._calls.took(operation, self._clock() - start_s)
                self._breaker.leave(ticket, Verdict.OK)
                return answer
            with self._lock:
                self._n_retries += 1
            self._sleep(pause_s)
            start_s = self._clock()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _pause_s(self, attempt: int) -> float:
        """Seconds to wait before a retry: anything between nothing and a limit that doubles."""
        config = self.guard_config
        limit_s = min(config.retry_max_s, config.retry_base_s * 2.0**attempt)
        return self._rng.uniform(0, limit_s)

    def _may_retry(self, exc: BaseException, attempt: int, ticket: Ticket) -> bool:
        """Whether the failure may pass soon, and nobody else has given the store up meanwhile."""
        transient = isinstance(exc, BackendUnavailable | BackendTimeout)
        if not transient or isinstance(exc, BreakerOpen) or ticket.probe:
            return False
        return attempt < self.guard_config.retries and self._breaker.admits(ticket)

    def _short_circuit(self) -> BreakerOpen:
        """Counts a call that is not made; what to raise for it."""
        with self._lock:
            self._n_short_circuits += 1
        view = self._breaker.view()
        probe = f"the next probe goes in {view.next_probe_s:.1f} s"
        if view.state is not BreakerState.OPEN:
            probe = "a probe is under way"
        return BreakerOpen(
            f"backend {self.name} is not asked: its breaker has been {view.state.value} for "
            f"{view.since_s:.1f} s, the last error was {view.last_error!r}; {probe}"
        )


def _verdict(exc: BaseException) -> Verdict:
    """What an exception says of the store."""
    if isinstance(exc, BackendFull):
        return Verdict.OK
    if isinstance(exc, NotImplementedError | UseAfterClose) or not isinstance(exc, Exception):
        return Verdict.NOTHING
    return Verdict.TIMED_OUT if isinstance(exc, BackendTimeout) else Verdict.FAILED


def _is_failed_load(exc: Exception) -> bool:
    """Whether a load was tried and failed: nobody asked the store if a breaker is open."""
    return not isinstance(exc, BreakerOpen) and _verdict(exc) is not Verdict.NOTHING
