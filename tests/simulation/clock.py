"""Virtual time: events in order, and processes whose events end with them."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from greenlet import GreenletExit, getcurrent, greenlet

MAX_EVENTS = 200_000
"""More events than any schedule needs: beyond it, somebody waits in a circle."""

TICK_S = 1e-6
"""The shortest time that can pass."""


class InvariantBroken(AssertionError):
    """The schedule found a bug; the message names the invariant and what was found."""


class VirtualClock:
    """Seconds that pass only when somebody waits for them; events run at their moment.

    Attributes:
        now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._n_events = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Has ``action`` called once ``delay_s`` have passed; those of one moment keep order."""
        self._n_events += 1
        heapq.heappush(self._events, (self.now + delay_s, self._n_events, action))

    def advance(self, seconds: float) -> None:
        """Lets ``seconds`` pass, with all that happens in them."""
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Lets time pass until ``condition`` holds, for ``timeout_s`` at most; whether it holds.

        Raises:
            InvariantBroken: without a timeout, if nothing is left that could happen.
        """
        end = None
        if timeout_s is not None:  # who waits for less than a tick would see no time pass
            end = self.now + (max(timeout_s, TICK_S) if timeout_s else 0.0)
        while not condition():
            if not self._events or (end is not None and self._events[0][0] > end):
                if end is None:
                    raise InvariantBroken("no hang: something waits for what will never happen")
                self.now = end
                return condition()
            self.now, _, action = heapq.heappop(self._events)
            if self._n_events > MAX_EVENTS:
                raise InvariantBroken(f"progress: {MAX_EVENTS} events, and the schedule goes on")
            action()
        return True


class Process:
    """What dies together: the tasks and events of one rank from its start to a crash.

    Tasks are greenlets: each looks like a thread to the code it runs, but they take turns at their
    ``sleep`` only, in the order of the virtual clock.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._alive = True
        self._tasks: set[greenlet] = set()
        self._hanging: list[greenlet] = []

    @property
    def n_hanging(self) -> int:
        """Tasks that hang until ``release``."""
        return len(self._hanging)

    @property
    def is_in_task(self) -> bool:
        """Whether a task of this process is what runs now."""
        return getcurrent() in self._tasks

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """As the clock's, unless the process has died by then."""
        self._clock.after(delay_s, lambda: action() if self._alive else None)

    def spawn(self, run: Callable[[], object]) -> None:
        """Runs ``run`` as a task, up to its first sleep."""

        def task() -> None:
            try:
                run()
            finally:
                self._tasks.discard(me)

        me = greenlet(task)
        self._tasks.add(me)
        self._resume(me)

    def sleep(self, seconds: float) -> None:
        """Lets ``seconds`` pass for the task that calls; the others go on."""
        me = getcurrent()
        self.after(seconds, lambda: self._resume(me))
        self._switch_away(me)

    def hang(self) -> None:
        """Stops the task that calls until ``release``."""
        me = getcurrent()
        self._hanging.append(me)
        self._switch_away(me)

    def release(self) -> None:
        """Lets all hanging tasks go on, now."""
        hanging, self._hanging = self._hanging, []
        for task in hanging:
            self.after(0.0, lambda task=task: self._resume(task))  # type: ignore[misc]

    def kill(self) -> None:
        """The process is gone: nothing of it happens any more."""
        self._alive = False
        self._hanging.clear()
        for task in list(self._tasks):
            task.parent = getcurrent()
            task.throw(GreenletExit)

    @staticmethod
    def _switch_away(task: greenlet) -> None:
        parent = task.parent
        assert parent is not None
        parent.switch()

    @staticmethod
    def _resume(task: greenlet) -> None:
        task.parent = getcurrent()
        task.switch()
