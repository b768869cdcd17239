"""Where copies run on CUDA: on a stream of their own, with an event for each layer.

Checked with emulated streams; not yet measured on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from typing import Any

import torch

from hicache_core.copies.base import CopyLayers, CopyQueue, Ticket
from hicache_core.errors import LoadFailed, UseAfterClose

POLL_S = 0.0005


class StreamTicket(Ticket):
    """Copies that were launched on a stream."""

    def __init__(self, cuda: Any, stream: Any, steps: list[range], copy: CopyLayers) -> None:
        """Launches nothing yet.

        Args:
            cuda: ``torch.cuda``, or an emulation of it in tests.
            stream: where the copies run; its device is that of the pages.
            steps: the layers of each step, in order.
            copy: copies layers; kept for as long as kernels read the memory that it holds.
        """
        self._cuda = cuda
        self._stream = stream
        self._steps = steps
        self._copy = copy
        self._events: list[Any] = []
        self._last: Any = None  # behind everything that was launched
        self._error: RuntimeError | None = None

    def launch(self) -> None:
        """Launches all steps, up to the first that fails, with an event after each."""
        try:
            for step in self._steps:
                self._copy(step)
                self._last = self._record()
                self._events.append(self._last)
        except RuntimeError as error:  # what torch raises for CUDA, and Triton for a launch
            self._error = error
            # A part of the step may run all the same, and its pages must not be reused meanwhile.
            with contextlib.suppress(RuntimeError):  # the device has failed: nothing runs
                self._last = self._record()

    def done(self) -> bool:
        # docstring inherited
        try:
            return self._last is None or bool(self._last.query())
        except RuntimeError as error:
            return self._failed(error)

    def wait(self, timeout_s: float | None = None) -> bool:
        # docstring inherited
        if timeout_s is None:
            return self._wait_for_ever()
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
        self._cuda.current_stream(self._stream.device).wait_event(self._events[step])

    @property
    def error(self) -> BaseException | None:
        # docstring inherited
        return self._error

    def _record(self) -> Any:
        event = self._cuda.Event()
        event.record(self._stream)
        return event

    def _wait_for_ever(self) -> bool:
        try:
            if self._last is not None:
                self._last.synchronize()
        except RuntimeError as error:
            return self._failed(error)
        return True

    def _failed(self, error: RuntimeError) -> bool:
        """A kernel has failed behind the launch, and the device with it: no copy runs any more."""
        self._error = self._error or error
        self._last = None
        return True


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
        ticket = StreamTicket(self._cuda, self._stream, steps, copy)
        # What compute has written so far, and the page tables, must be there before they are read.
        # The current stream is that of the pages' device, which need not be the current device.
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            ticket.launch()
        # A ticket that its owner drops must not free page tables that a kernel still reads.
        self._under_way = [*(t for t in self._under_way if not t.done()), ticket]
        return ticket

    def close(self) -> None:
        # docstring inherited
        if self._stream is not None:
            with contextlib.suppress(RuntimeError):  # the device has failed: no copy runs any more
                self._stream.synchronize()
            self._stream = None
            self._under_way.clear()
