"""Queues and tickets: order, layer by layer, errors, close."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from hicache_core.copies import queues
from hicache_core.copies.base import CopyLayers, CopyQueue
from hicache_core.copies.queues import InlineQueue, ThreadQueue
from hicache_core.errors import LoadFailed, UseAfterClose

LAYERS = [range(i, i + 1) for i in range(4)]


class Gate:
    """A copy that notes its layers, and stops before ``stop_at`` until it is opened."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.opened = threading.Event()
        self.layers: list[int] = []

    def __call__(self, layers: range) -> None:
        if self.stop_at in layers:
            assert self.opened.wait(10)
        self.layers += layers


@pytest.fixture
def queue() -> Iterator[ThreadQueue]:
    queue = ThreadQueue()
    queue.open()
    yield queue
    queue.close()


def failing_at(layer: int) -> CopyLayers:
    def copy(layers: range) -> None:
        if layer in layers:
            raise RuntimeError("the bus is on fire")

    return copy


def test_a_layer_that_has_arrived_does_not_wait_for_the_next(queue: ThreadQueue) -> None:
    gate = Gate(stop_at=2)
    ticket = queue.submit(LAYERS, gate)
    ticket.wait_layer(0)
    ticket.wait_layer(1)
    assert gate.layers == [0, 1]
    assert not ticket.done()
    assert not ticket.wait(0.01)
    assert ticket.error is None
    gate.opened.set()
    ticket.wait_layer(3)
    assert gate.layers == [0, 1, 2, 3]
    assert ticket.wait(10)
    assert ticket.done()


def test_one_step_of_all_layers_serves_every_layer(queue: ThreadQueue) -> None:
    gate = Gate(stop_at=9)
    ticket = queue.submit([range(4)], gate)
    for layer in range(4):
        ticket.wait_layer(layer)
    assert gate.layers == [0, 1, 2, 3]


def test_copies_run_in_the_order_of_submission(queue: ThreadQueue) -> None:
    gate = Gate(stop_at=0)
    seen: list[str] = []
    queue.submit(LAYERS, gate)

    def noting(name: str) -> CopyLayers:
        return lambda _layers: seen.append(name)

    tickets = [queue.submit([range(1)], noting(name)) for name in "abc"]
    assert not any(ticket.done() for ticket in tickets)
    gate.opened.set()
    assert all(ticket.wait(10) for ticket in tickets)
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [InlineQueue, ThreadQueue])
def test_a_copy_that_fails_settles_its_ticket_and_harms_no_other(kind: type[CopyQueue]) -> None:
    queue = kind()
    queue.open()
    ticket = queue.submit(LAYERS, failing_at(2))
    after = queue.submit(LAYERS, Gate(stop_at=9))
    assert ticket.wait(10)
    assert ticket.done()
    assert isinstance(ticket.error, RuntimeError)
    for layer in (2, 3, 0):
        with pytest.raises(LoadFailed, match="the bus is on fire"):
            ticket.wait_layer(layer)
    assert after.wait(10)
    assert after.error is None
    queue.close()


def test_a_failure_wakes_who_waits_for_a_later_layer(queue: ThreadQueue) -> None:
    gate = Gate(stop_at=0)

    def copy(layers: range) -> None:
        gate(layers)
        raise RuntimeError("no layer arrives")

    ticket = queue.submit(LAYERS, copy)
    threading.Timer(0.05, gate.opened.set).start()
    with pytest.raises(LoadFailed):
        ticket.wait_layer(3)


def test_close_lets_submitted_copies_end(queue: ThreadQueue) -> None:
    gate = Gate(stop_at=0)
    tickets = [queue.submit(LAYERS, gate), queue.submit(LAYERS, Gate(stop_at=9))]
    threading.Timer(0.05, gate.opened.set).start()
    queue.close()
    assert [ticket.done() for ticket in tickets] == [True, True]
    assert not [t for t in threading.enumerate() if t.name.startswith("hicache-copy")]


@pytest.mark.parametrize("kind", [InlineQueue, ThreadQueue])
def test_nothing_is_taken_before_open_nor_after_close(kind: type[CopyQueue]) -> None:
    queue = kind()
    with pytest.raises(UseAfterClose):
        queue.submit(LAYERS, Gate(stop_at=9))
    queue.open()
    assert queue.submit(LAYERS, Gate(stop_at=9)).wait(10)
    queue.close()
    queue.close()
    with pytest.raises(UseAfterClose):
        queue.submit(LAYERS, Gate(stop_at=9))


def test_the_inline_queue_has_copied_when_submit_returns() -> None:
    queue = InlineQueue()
    queue.open()
    gate = Gate(stop_at=9)
    assert queue.submit(LAYERS, gate).done()
    assert gate.layers == [0, 1, 2, 3]


def test_the_copy_thread_ends_with_the_main_thread_if_nobody_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queues, "LOOK_INTERVAL_S", 0.01)
    ended = threading.Event()
    monkeypatch.setattr(queues, "main_has_ended", ended.is_set)
    queue = ThreadQueue()
    queue.open()
    assert queue.submit(LAYERS, Gate(stop_at=9)).wait(10)
    (thread,) = [t for t in threading.enumerate() if t.name == "hicache-copy"]
    ended.set()
    thread.join(10)
    assert not thread.is_alive()
    queue.close()
