"""Guards and seals of real backends, as metrics show them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hicache_core.errors import BackendUnavailable
from hicache_core.observe.metrics import CacheCollector, exposition
from hicache_core.observe.stores import backend_statuses, rejected_pages
from hicache_core.observe.usage import UsageWatch
from hicache_core.observe.windows import Watch
from hicache_core.storage.base import Buffer
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page
from tests.no_threads import no_threads
from tests.unit.observe.worlds import full_snapshot

KEY = f"{'ab' * 8}/{'cd' * 32}"


class Failing(MemoryBackend):
    """A store whose questions fail."""

    def batch_exists(self, keys: object) -> int:
        raise BackendUnavailable("connection refused")

    def exists(self, key: str) -> bool:
        raise BackendUnavailable("connection refused")


def stacked(
    backend_class: type[MemoryBackend],
) -> tuple[MemoryBackend, SealedBackend, GuardedBackend]:
    backend = backend_class(MemoryConfig(), BackendContext("ab" * 8))
    seal = SealedBackend(backend)
    guard = GuardedBackend(seal, GuardConfig())
    guard.open()
    return backend, seal, guard


def page(nbytes: int) -> Page:
    return (memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(nbytes)))


def test_calls_and_bytes_of_a_store_are_seen() -> None:
    _, _, guard = stacked(MemoryBackend)
    assert guard.batch_set([KEY], [page(1000)]) == 1
    assert guard.batch_exists([KEY]) == 1
    assert guard.batch_get([KEY], [page(1000)]) == 1
    (status,) = backend_statuses([guard])
    calls = {operation.op: operation.latency_s.n for operation in status.operations}
    assert (status.name, status.breaker) == ("memory", "closed")
    assert (calls["set"], calls["exists"], calls["get"]) == (1, 1, 1)
    assert status.stored_nbytes >= 1000
    assert status.loaded_nbytes >= 1000
    assert full_snapshot(backends=[status]).questions == 1
    guard.close()


def test_errors_of_a_store_are_seen_by_kind() -> None:
    _, _, guard = stacked(Failing)
    with pytest.raises(BackendUnavailable):
        guard.batch_exists([KEY])
    (status,) = backend_statuses([guard])
    errors = {operation.op: operation.errors for operation in status.operations}
    assert errors["exists"]["BackendUnavailable"] == 1 + status.retries
    assert errors["get"] == {}
    assert "connection refused" in status.last_error
    guard.close()


def test_refused_objects_of_all_stores_are_summed_up() -> None:
    seals = []
    for _ in range(2):
        backend, seal, guard = stacked(MemoryBackend)
        broken: Buffer = bytes(HEADER_NBYTES + 8)
        backend.set(KEY, broken)
        assert seal.get(KEY) is None
        seals.append(seal)
        guard.close()
    assert rejected_pages(seals)["corrupt"] == 2
    assert rejected_pages(seals)["foreign"] == 0


def test_two_stores_of_one_name_are_two_labels() -> None:
    guards = [stacked(MemoryBackend)[2] for _ in range(3)]
    snapshot = full_snapshot(backends=backend_statuses(guards))
    text = exposition(CacheCollector(Watch(lambda: snapshot))).decode()
    names = {
        sample.labels["backend"]
        for family in text_string_to_metric_families(text)
        if family.name == "hicache:storage_breaker_state"
        for sample in family.samples
    }
    assert names == {"memory", "memory-2", "memory-3"}
    for guard in guards:
        guard.close()


class Asked(MemoryBackend):
    """Counts how often it is asked what it holds, and may be stuck meanwhile."""

    n_asked = 0
    gate: threading.Event | None = None

    def usage(self) -> Mapping[str, int]:
        self.n_asked += 1
        if self.gate is not None:
            assert self.gate.wait(20)
        return super().usage()


def until(is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_a_store_holds_is_found_out_beside_and_seldom() -> None:
    now = [0.0]
    backend, _, guard = stacked(Asked)
    assert isinstance(backend, Asked)
    assert guard.batch_set([KEY], [page(1000)]) == 1
    watch = UsageWatch([guard], lambda: now[0])
    watch.nbytes()
    until(lambda: watch.nbytes() != [{}])
    (status,) = backend_statuses([guard], watch.nbytes())
    assert status.usage_nbytes == {"ab" * 8: backend.usage()["ab" * 8]}
    n_asked = backend.n_asked
    now[0] = 29.0
    assert watch.nbytes()[0]
    watch.close()
    assert backend.n_asked == n_asked
    guard.close()


def test_a_store_that_does_not_answer_keeps_nobody_and_is_asked_once() -> None:
    backend, _, guard = stacked(Asked)
    assert isinstance(backend, Asked)
    backend.gate = threading.Event()
    watch = UsageWatch([guard], lambda: 0.0)
    for _ in range(5):
        assert watch.nbytes() == [{}]
    until(lambda: backend.n_asked == 1)
    backend.gate.set()
    watch.close(20.0)
    assert backend.n_asked == 1
    guard.close()


def test_a_look_while_no_thread_can_be_started_tells_nothing_and_the_next_one_asks() -> None:
    _, _, guard = stacked(Asked)
    assert guard.batch_set([KEY], [page(1000)]) == 1
    watch = UsageWatch([guard], lambda: 0.0)
    with no_threads("hicache-usage"):
        assert watch.nbytes() == [{}]
    until(lambda: watch.nbytes() != [{}])
    watch.close()
    guard.close()


def test_a_store_that_takes_long_to_count_is_asked_less_often() -> None:
    now = [0.0]
    _, _, guard = stacked(Asked)

    class Slow(Asked):
        def usage(self) -> Mapping[str, int]:
            now[0] += 10.0
            return super().usage()

    slow = Slow(MemoryConfig(), BackendContext("ab" * 8))
    slow.open()
    watch = UsageWatch([slow], lambda: now[0])
    watch.nbytes()
    until(lambda: watch._next_s is not None)
    assert watch._next_s == 10.0 + 1000.0
    watch.close()
    slow.close()
    guard.close()


@pytest.mark.parametrize("error", [BackendUnavailable("gone"), OSError("gone")])
def test_a_store_that_cannot_say_shows_no_usage(error: Exception) -> None:
    class Failed(MemoryBackend):
        def usage(self) -> Mapping[str, int]:
            raise error

    store = Failed(MemoryConfig(), BackendContext("ab" * 8))
    watch = UsageWatch([store], lambda: 0.0)
    watch.nbytes()
    until(lambda: watch._next_s is not None)
    assert watch.nbytes() == [{}]
    watch.close()


def test_kinds_of_refused_objects_are_there_before_the_first() -> None:
    _, seal, guard = stacked(MemoryBackend)
    assert rejected_pages([seal]) == dict.fromkeys(
        ("corrupt", "foreign", "wrong_length", "wrong_version"), 0
    )
    guard.close()
