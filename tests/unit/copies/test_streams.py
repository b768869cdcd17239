"""Copies on CUDA streams, with emulated streams: what is launched, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hicache_core.copies.streams import StreamQueue
from hicache_core.errors import LoadFailed, UseAfterClose

LAYERS = [range(i, i + 1) for i in range(3)]
GPU, OTHER_GPU = torch.device("cuda:1"), torch.device("cuda:0")


class EmulatedCuda:
    """Stands in for ``torch.cuda``: notes what is asked of it; events happen when told to."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.compute = EmulatedStream(self, "compute", GPU)
        self.current = self.compute
        self.n_events = 0
        self.n_happened = 0
        self.broken: Exception | None = None

    def Stream(self, device: torch.device) -> EmulatedStream:
        return EmulatedStream(self, f"copies on {device}", device)

    def Event(self) -> EmulatedEvent:
        self.n_events += 1
        return EmulatedEvent(self, self.n_events)

    def current_stream(self, device: torch.device | None = None) -> EmulatedStream:
        """As torch's: without a device, the stream of the current device, which is another one."""
        return self.current if device == GPU else EmulatedStream(self, "another GPU", OTHER_GPU)

    def check(self) -> None:
        if self.broken is not None:
            raise self.broken

    @contextmanager
    def stream(self, stream: EmulatedStream) -> Iterator[None]:
        self.current = stream
        yield
        self.current = self.compute


class EmulatedStream:
    def __init__(self, cuda: EmulatedCuda, name: str, device: torch.device) -> None:
        self.cuda, self.name, self.device = cuda, name, device

    def wait_stream(self, other: EmulatedStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: EmulatedEvent) -> None:
        self.cuda.log.append(f"{self.name} waits for event {event.number}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"synchronize {self.name}")
        self.cuda.check()


class EmulatedEvent:
    def __init__(self, cuda: EmulatedCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def record(self, stream: EmulatedStream) -> None:
        self.cuda.check()
        self.cuda.log.append(f"event {self.number} on {stream.name}")

    def query(self) -> bool:
        self.cuda.check()
        return self.cuda.n_happened >= self.number

    def synchronize(self) -> None:
        self.cuda.check()
        self.cuda.n_happened = self.number


@pytest.fixture
def cuda() -> EmulatedCuda:
    return EmulatedCuda()


@pytest.fixture
def queue(cuda: EmulatedCuda) -> StreamQueue:
    queue = StreamQueue(GPU, cuda)
    queue.open()
    return queue


def test_layers_are_launched_behind_compute_with_an_event_each(
    cuda: EmulatedCuda, queue: StreamQueue
) -> None:
    queue.submit(LAYERS[:2], lambda step: cuda.log.append(f"{cuda.current.name}: copy {step[0]}"))
    assert cuda.log == [
        "copies on cuda:1 waits for compute",
        "copies on cuda:1: copy 0",
        "event 1 on copies on cuda:1",
        "copies on cuda:1: copy 1",
        "event 2 on copies on cuda:1",
    ]
    assert cuda.current is cuda.compute


def test_attention_of_a_layer_waits_for_the_event_of_that_layer_only(
    cuda: EmulatedCuda, queue: StreamQueue
) -> None:
    by_layer = queue.submit(LAYERS, lambda step: None)
    at_once = queue.submit([range(3)], lambda step: None)
    cuda.log.clear()
    by_layer.wait_layer(0)
    by_layer.wait_layer(2)
    at_once.wait_layer(0)
    at_once.wait_layer(2)
    assert cuda.log == [f"compute waits for event {n}" for n in (1, 3, 4, 4)]


def test_a_ticket_is_done_when_its_last_event_has_happened(
    cuda: EmulatedCuda, queue: StreamQueue
) -> None:
    ticket = queue.submit(LAYERS, lambda step: None)
    cuda.n_happened = 2
    assert not ticket.done()
    assert not ticket.wait(0.002)
    cuda.n_happened = 3
    assert ticket.done()
    assert ticket.wait(0.002)
    assert ticket.wait()


def test_wait_without_a_timeout_synchronizes_with_the_last_event(
    cuda: EmulatedCuda, queue: StreamQueue
) -> None:
    ticket = queue.submit(LAYERS, lambda step: None)
    assert ticket.wait()
    assert cuda.n_happened == 3


def test_a_launch_that_fails_is_settled_when_all_that_was_launched_has_ended(
    cuda: EmulatedCuda, queue: StreamQueue
) -> None:
    """The failing step may have begun to write its pages, so they belong to the ticket, too."""

    def copy(layers: range) -> None:
        if 1 in layers:
            raise RuntimeError("CUDA error: out of luck")

    ticket = queue.submit(LAYERS, copy)
    assert isinstance(ticket.error, RuntimeError)
    with pytest.raises(LoadFailed, match="out of luck"):
        ticket.wait_layer(0)
    cuda.n_happened = 1  # layer 0 has arrived
    assert not ticket.done()
    assert ticket.wait()
    assert cuda.n_happened == 2
    assert ticket.done()
    assert cuda.current is cuda.compute


@pytest.mark.parametrize("ask", ["done", "wait"])
def test_a_kernel_that_fails_later_is_the_error_of_its_ticket(
    cuda: EmulatedCuda, queue: StreamQueue, ask: str
) -> None:
    ticket = queue.submit(LAYERS, lambda step: None)
    cuda.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert getattr(ticket, ask)()
    assert ticket.error is cuda.broken
    with pytest.raises(LoadFailed, match="illegal memory access"):
        ticket.wait_layer(0)


def test_a_device_that_has_failed_settles_what_is_launched_on_it(
    cuda: EmulatedCuda, queue: StreamQueue
) -> None:
    cuda.broken = RuntimeError("CUDA error: unspecified launch failure")
    ticket = queue.submit(LAYERS, lambda step: None)
    assert ticket.error is cuda.broken
    assert ticket.done()
    queue.close()
    with pytest.raises(UseAfterClose):
        queue.submit(LAYERS, lambda step: None)


def test_close_synchronizes_and_nothing_is_taken_afterwards(
    cuda: EmulatedCuda, queue: StreamQueue
) -> None:
    queue.submit(LAYERS, lambda step: None)
    queue.close()
    queue.close()
    assert cuda.log[-1] == "synchronize copies on cuda:1"
    assert cuda.log.count(cuda.log[-1]) == 1
    with pytest.raises(UseAfterClose):
        queue.submit(LAYERS, lambda step: None)
