"""Where copies run on CUDA: on a stream of their own, with an event for each layer.

Checked with emulated streams; not yet measured on a GPU.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from typing import Any

import torch

from hicache_core.copies.base import CopyLayers, CopyQueue, Ticket
from hicache_core.errors import LoadFailed, UseAfterClose

POLL_S = 0.0005


class StreamTicket(Ticket):
    """Copies that were launched on a stream."""

    def __init__(self, cuda: Any, steps: list[range], copy: CopyLayers) -> None:
        """Launches nothing yet.

        Args:
            cuda: ``torch.cuda``, or an emulation of it in tests.
            steps: the layers of each step, in order.
            copy: copies layers; kept for as long as kernels read the memory that it holds.
        """
        self._cuda = cuda
        self._steps = steps
        self._copy = copy
        self._events: list[Any] = []
        self._error: RuntimeError | None = None

    def launch(self, stream: Any) -> None:
        """Launches all steps, up to the first that fails, with an event after each."""
        try:
            for step in self._steps:
                self._copy(step)
                event = self._cuda.Event()
                event.record(stream)
                self._events.append(event)
        except RuntimeError as error:  # what torch raises for CUDA, and Triton for a launch
            self._error = error

    def done(self) -> bool:
        # docstring inherited
        return not self._events or bool(self._events[-1].query())

    def wait(self, timeout_s: float | None = None) -> bool:
        # docstring inherited
        if timeout_s is None:
            for event in self._events[-1:]:
                event.synchronize()
            return True
        deadline = time.monotonic() + timeout_s  # CUDA has no wait with a deadline
        while not self.done():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True

    def wait_layer(self, layer: int) -> None:
        # docstring inherited
        if self._error is not None:
            raise LoadFailed(f"the copy of layer {layer} failed: {self._error!r}") from self._error
        step = bisect_right([step.stop for step in self._steps], layer)
        self._cuda.current_stream().wait_event(self._events[step])

    @property
    def error(self) -> BaseException | None:
        # docstring inherited
        return self._error


class StreamQueue(CopyQueue):
    """One CUDA stream: copies run one after the other, concurrently with compute."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """Makes nothing; ``open`` does.

        Args:
            device: the GPU.
            cuda: the module ``torch.cuda``, or an emulation of it in tests.
        """
        self._device = device
        self._cuda = cuda
        self._stream: Any = None
        self._under_way: list[StreamTicket] = []

    def open(self) -> None:
        # docstring inherited
        self._stream = self._cuda.Stream(self._device)

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        # docstring inherited
        if self._stream is None:
            raise UseAfterClose("this transfer is closed, or was not opened")
        ticket = StreamTicket(self._cuda, steps, copy)
        # What compute has written so far, and the page tables, must be there before they are read.
        self._stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(self._stream):
            ticket.launch(self._stream)
        # A ticket that its owner drops must not free page tables that a kernel still reads.
        self._under_way = [*(t for t in self._under_way if not t.done()), ticket]
        return ticket

    def close(self) -> None:
        # docstring inherited
        if self._stream is not None:
            self._stream.synchronize()
            self._stream = None
            self._under_way.clear()
