"""A copy queue whose copies happen layer by layer at moments of the virtual clock."""

from __future__ import annotations

from collections import deque
from random import Random

from hicache_core.copies.base import CopyLayers, CopyQueue, Ticket
from hicache_core.errors import LoadFailed, UseAfterClose
from tests.simulation.clock import Process, VirtualClock


class SimTicket(Ticket):
    """One copy: its steps wait, are done, or will never be."""

    def __init__(self, clock: VirtualClock, steps: list[range], copy: CopyLayers) -> None:
        """Keeps its arguments; the queue runs the steps."""
        self.steps = deque(steps)
        self.copy = copy
        self._clock = clock
        self._layers_done = 0
        self._error: BaseException | None = None
        self._ended = False

    def run_step(self) -> None:
        """Copies the next step."""
        step = self.steps.popleft()
        self.copy(step)
        self._layers_done = step.stop
        self._ended = not self.steps

    def fail(self) -> None:
        """Ends the copy where it stands."""
        self._error = RuntimeError("injected fault: the copy engine broke")
        self._ended = True

    def done(self) -> bool:
        # docstring inherited
        return self._ended

    def wait(self, timeout_s: float | None = None) -> bool:
        # docstring inherited
        return self._clock.run_until(self.done, timeout_s)

    def wait_layer(self, layer: int) -> None:
        # docstring inherited
        self._clock.run_until(lambda: self._ended or self._layers_done > layer, None)
        if self._error is not None:
            raise LoadFailed(f"the copy of layer {layer} failed") from self._error

    @property
    def error(self) -> BaseException | None:
        # docstring inherited
        return self._error


class SimCopyQueue(CopyQueue):
    """First in, first out; each step takes a seeded time, and a rare copy fails."""

    def __init__(
        self, clock: VirtualClock, process: Process, draw: Random, failure_rate: float
    ) -> None:
        """Keeps its arguments.

        Args:
            clock: the time.
            process: whose copies these are.
            draw: decides times and failures.
            failure_rate: share of the copies that fail at some step.
        """
        self._clock = clock
        self._process = process
        self._draw = draw
        self._failure_rate = failure_rate
        self._tickets: deque[SimTicket] = deque()
        self._is_open = False

    def open(self) -> None:
        # docstring inherited
        self._is_open = True

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        # docstring inherited
        if not self._is_open:
            raise UseAfterClose("this transfer is closed, or was not opened")
        ticket = SimTicket(self._clock, steps, copy)
        self._tickets.append(ticket)
        if len(self._tickets) == 1:
            self._next_step()
        return ticket

    def close(self) -> None:
        # docstring inherited
        self._clock.run_until(lambda: not self._tickets, None)
        self._is_open = False

    def _next_step(self) -> None:
        delay_s = self._draw.choice((0.0, 0.001, 0.01, 0.2))
        self._process.after(delay_s, self._step)

    def _step(self) -> None:
        ticket = self._tickets[0]
        if self._draw.random() < self._failure_rate:
            ticket.fail()
        else:
            ticket.run_step()
        if ticket.done():
            self._tickets.popleft()
        if self._tickets:
            self._next_step()
