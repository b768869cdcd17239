"""Windows over counters: the recent hit rate, and the alarm for a cache that only writes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hicache_core.observe.snapshot import CacheSnapshot

log = logging.getLogger(__name__)

_STEPS = 60  # samples that a window keeps at most, roughly


class Window:
    """How much counters grew within the last ``window_s`` seconds. One thread at a time."""

    def __init__(self, window_s: float) -> None:
        """Starts without a sample."""
        self._window_s = window_s
        self._samples: deque[tuple[float, tuple[int, ...]]] = deque()

    def growth(self, now: float, values: tuple[int, ...]) -> tuple[int, ...]:
        """Adds ``values`` at ``now`` and returns how much each grew since the window began.

        The window begins at the newest sample that is ``window_s`` old, or at the first one. If a
        counter shrank, it was reset, and the window starts again.
        """
        samples = self._samples
        if samples and any(new < old for new, old in zip(values, samples[-1][1], strict=True)):
            samples.clear()
        if not samples or now - samples[-1][0] >= self._window_s / _STEPS:
            samples.append((now, values))
        while len(samples) > 1 and now - samples[1][0] >= self._window_s:
            samples.popleft()
        return tuple(new - old for new, old in zip(values, samples[0][1], strict=True))


class HitRate:
    """The recent share of tokens that were hits."""

    def __init__(self, window_s: float = 60.0) -> None:
        """Looks back ``window_s`` seconds."""
        self._window = Window(window_s)

    def update(self, now: float, snapshot: CacheSnapshot) -> float:
        """Adds a snapshot; returns hit tokens / prompt tokens within the window, 0 without any."""
        hits = sum(snapshot.hit_tokens.values())
        missed = snapshot.counters.get("missed_tokens", 0)
        n_hit, n_missed = self._window.growth(now, (hits, missed))
        return n_hit / (n_hit + n_missed) if n_hit else 0.0


class WriteOnlyAlarm:
    """Raised while much is stored and storage is asked often, but nothing is loaded from it.

    Such a cache has a cost but no use. Causes are keys that no reader computes, a new namespace at
    each start, or a store that evicts at once. One thread at a time.
    """

    def __init__(
        self,
        *,
        window_s: float = 600.0,
        min_stored_nbytes: int = 1 << 30,
        min_questions: int = 100,
    ) -> None:
        """Sets the bounds.

        Args:
            window_s: length of the window in seconds.
            min_stored_nbytes: bytes stored within the window that raise the alarm.
            min_questions: lookups within the window that raise the alarm.
        """
        self._window = Window(window_s)
        self._window_s = window_s
        self._min_stored_nbytes = min_stored_nbytes
        self._min_questions = min_questions
        self._said = False
        self.raised = False

    def update(self, now: float, snapshot: CacheSnapshot) -> bool:
        """Adds a snapshot; returns whether the alarm is raised. Logs a warning the first time."""
        stored, loaded, asked = self._window.growth(
            now, (snapshot.stored_nbytes, snapshot.loaded_nbytes, snapshot.questions)
        )
        self.raised = (
            stored >= self._min_stored_nbytes and asked >= self._min_questions and loaded == 0
        )
        if self.raised and not self._said:
            self._said = True
            log.warning(
                "storage is only written to: %d bytes stored and none loaded in %d lookups within"
                " %.0f s; check that writers and readers have the same model, page size, layout and"
                " salt (hicache why shows it)",
                stored,
                asked,
                self._window_s,
            )
        return self.raised


@dataclass(frozen=True)
class Observation:
    """A snapshot, and values that need several snapshots.

    Attributes:
        snapshot: the cache.
        hit_rate: share of tokens that hit within the last minute.
        write_only: whether the alarm for a cache that only writes is raised.
    """

    snapshot: CacheSnapshot
    hit_rate: float
    write_only: bool


class Watch:
    """Observes one cache on request; from any thread."""

    def __init__(
        self,
        snapshot: Callable[[], CacheSnapshot],
        *,
        alarm: WriteOnlyAlarm | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes no snapshot yet.

        Args:
            snapshot: takes a snapshot; called on the thread that asks, one at a time.
            alarm: the alarm for a cache that only writes; None for one with default limits.
            clock: seconds, increasing.
        """
        self._snapshot = snapshot
        self._alarm = alarm or WriteOnlyAlarm()
        self._hit_rate = HitRate()
        self._clock = clock
        self._lock = threading.Lock()

    def observe(self) -> Observation:
        """Takes a snapshot now."""
        with self._lock:
            snapshot, now = self._snapshot(), self._clock()
            return Observation(
                snapshot,
                hit_rate=self._hit_rate.update(now, snapshot),
                write_only=self._alarm.update(now, snapshot),
            )
