"""Results of finished tasks, which wait until LMCache fetches them."""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar

R = TypeVar("R")


class Event(Protocol):
    """A file descriptor that can be polled: LMCache's event notifier."""

    def fileno(self) -> int:
        """Returns the descriptor, which is readable after ``notify``."""
        ...

    def notify(self) -> None:
        """Makes the descriptor readable."""
        ...

    def close(self) -> None:
        """Closes the descriptor."""
        ...


class FinishedTasks(Generic[R]):
    """The results of one kind of task. Any thread."""

    def __init__(self, event: Event) -> None:
        """Stores its argument: ``event`` is notified of each result, and closed here."""
        self._event = event
        self._lock = threading.Lock()
        self._results: dict[int, R] = {}
        self._closed = False

    def fileno(self) -> int:
        """Returns the descriptor that becomes readable with each result."""
        return self._event.fileno()

    def add(self, task: int, result: R) -> None:
        """Keeps the result of a task and says that there is one; does nothing once closed."""
        with self._lock:  # also around notify: its descriptor must not be closed meanwhile
            if not self._closed:
                self._results[task] = result
                self._event.notify()

    def take(self, task: int) -> R | None:
        """Removes and returns the result of a task; None if there is none yet, or no more."""
        with self._lock:
            return self._results.pop(task, None)

    def take_all(self) -> dict[int, R]:
        """Removes and returns all results by task."""
        with self._lock:
            results, self._results = self._results, {}
            return results

    def close(self) -> None:
        """Closes the event. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._event.close()
