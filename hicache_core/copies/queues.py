"""Where copies run on a CPU: on a thread of their own, or in line for tests."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue

from hicache_core.copies.base import CopyLayers, CopyQueue, Ticket
from hicache_core.errors import LoadFailed, UseAfterClose
from hicache_core.process.main_thread import main_has_ended

LOOK_INTERVAL_S = 1.0
"""An idle copy thread looks this often whether the main thread has ended."""


class ThreadTicket(Ticket):
    """A copy on another thread, in steps of some layers."""

    def __init__(self, steps: list[range], copy: CopyLayers) -> None:
        """Keeps its arguments; ``run`` makes the copies."""
        self._steps = steps
        self._copy = copy
        self._layers_done = 0
        self._has_ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition(threading.Lock())

    def run(self) -> None:
        """Copies all steps; on the copy thread. What a copy raises is the ticket's ``error``."""
        try:
            for step in self._steps:
                self._copy(step)
                if step is not self._steps[-1]:
                    self._tell(step.stop)
        except Exception as error:  # whoever waits for the ticket raises it
            self._error = error
            self._tell(self._layers_done, has_ended=True)
        else:
            self._tell(self._steps[-1].stop, has_ended=True)

    def _tell(self, layers_done: int, *, has_ended: bool = False) -> None:
        with self._changed:
            self._layers_done, self._has_ended = layers_done, has_ended
            self._changed.notify_all()

    def done(self) -> bool:
        # docstring inherited
        return self._has_ended

    def wait(self, timeout_s: float | None = None) -> bool:
        # docstring inherited
        with self._changed:
            return self._changed.wait_for(lambda: self._has_ended, timeout_s)

    def wait_layer(self, layer: int) -> None:
        # docstring inherited
        if self._layers_done <= layer:
            with self._changed:
                self._changed.wait_for(lambda: self._layers_done > layer or self._has_ended)
        # Also if the copy failed at a later layer: its pages are given up as a whole.
        if (error := self._error) is not None:
            raise LoadFailed(f"the copy of layer {layer} failed: {error!r}") from error

    @property
    def error(self) -> BaseException | None:
        # docstring inherited
        return self._error


class ThreadQueue(CopyQueue):
    """One copy thread, first in, first out; it overlaps with compute, since copies run without
    Python's lock."""

    def __init__(self) -> None:
        """Starts nothing; ``open`` does."""
        self._tickets: SimpleQueue[ThreadTicket | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        # docstring inherited
        thread = threading.Thread(target=_run_tickets, args=[self._tickets], name="hicache-copy")
        thread.start()  # now: later there may be none to be had
        self._thread = thread

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        # docstring inherited
        if self._thread is None:
            raise UseAfterClose("this transfer is closed, or was not opened")
        ticket = ThreadTicket(steps, copy)
        self._tickets.put(ticket)
        return ticket

    def close(self) -> None:
        # docstring inherited
        if self._thread is not None:
            self._tickets.put(None)
            self._thread.join()
            self._thread = None


def _run_tickets(tickets: SimpleQueue[ThreadTicket | None]) -> None:
    """Makes copies until None comes, or the main thread has ended: nobody will close the queue."""
    while True:
        try:
            ticket = tickets.get(timeout=LOOK_INTERVAL_S)
        except Empty:
            if main_has_ended():
                return
            continue
        if ticket is None:
            return
        ticket.run()
        del ticket  # an idle thread must not keep pages alive


class InlineQueue(CopyQueue):
    """Copies on the calling thread, before ``submit`` returns: deterministic, for tests."""

    def __init__(self) -> None:
        """Closed until ``open``."""
        self._is_open = False

    def open(self) -> None:
        # docstring inherited
        self._is_open = True

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        # docstring inherited
        if not self._is_open:
            raise UseAfterClose("this transfer is closed, or was not opened")
        ticket = ThreadTicket(steps, copy)
        ticket.run()
        return ticket

    def close(self) -> None:
        # docstring inherited
        self._is_open = False
