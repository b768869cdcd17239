"""Where copies run on a CPU: on a thread of their own, or in line for tests."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from hicache_core.copies.base import CopyLayers, CopyQueue, Ticket
from hicache_core.errors import LoadFailed, UseAfterClose


class ThreadTicket(Ticket):
    """A copy on another thread, in steps of some layers."""

    def __init__(self, steps: list[range], copy: CopyLayers) -> None:
        """Keeps its arguments; ``run`` makes the copies. Set ``future`` before any other use."""
        self.future: Future[None] = Future()
        self._steps = steps
        self._copy = copy
        self._layers_done = 0
        self._changed = threading.Condition()

    def run(self) -> None:
        """Copies all steps; on the copy thread."""
        for step in self._steps:
            self._copy(step)
            with self._changed:
                self._layers_done = step.stop
                self._changed.notify_all()

    def ended(self, _future: Future[None]) -> None:
        """Wakes those that wait for a layer; on the copy thread, once the future is settled."""
        with self._changed:
            self._changed.notify_all()

    def done(self) -> bool:
        # docstring inherited
        return self.future.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        # docstring inherited
        try:
            self.future.exception(timeout_s)
        except TimeoutError:
            return False
        return True

    def wait_layer(self, layer: int) -> None:
        # docstring inherited
        if self._layers_done <= layer:
            with self._changed:
                self._changed.wait_for(lambda: self._layers_done > layer or self.future.done())
        # Also if the copy failed at a later layer: its pages are given up as a whole.
        if (error := self.error) is not None:
            raise LoadFailed(f"the copy of layer {layer} failed: {error!r}") from error

    @property
    def error(self) -> BaseException | None:
        # docstring inherited
        return self.future.exception() if self.future.done() else None


class ThreadQueue(CopyQueue):
    """One copy thread, first in, first out; it overlaps with compute, since copies run without
    Python's lock."""

    def __init__(self) -> None:
        """Starts nothing; ``open`` does."""
        self._pool: ThreadPoolExecutor | None = None

    def open(self) -> None:
        # docstring inherited
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hicache-copy")
        try:
            pool.submit(int).result()  # starts the thread now: later there may be none to be had
        except RuntimeError:
            pool.shutdown()
            raise
        self._pool = pool

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        # docstring inherited
        if self._pool is None:
            raise UseAfterClose("this transfer is closed, or was not opened")
        ticket = ThreadTicket(steps, copy)
        ticket.future = self._pool.submit(ticket.run)
        ticket.future.add_done_callback(ticket.ended)
        return ticket

    def close(self) -> None:
        # docstring inherited
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


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
        try:
            ticket.run()
        except (RuntimeError, ValueError, MemoryError, OSError) as error:  # what copies raise
            ticket.future.set_exception(error)
        else:
            ticket.future.set_result(None)
        return ticket

    def close(self) -> None:
        # docstring inherited
        self._is_open = False
