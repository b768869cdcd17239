"""Rules of the guard: a bad store costs little, and a good one is asked as ever."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    BreakerOpen,
)
from hicache_core.storage.base import Clearable, Listable, Pins, ReportsUsage
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.breaker import BreakerState
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.testing.harness import required
from tests.unit.storage.virtual import (
    CONTEXT,
    NBYTES,
    Clock,
    TellsEach,
    Told,
    blank,
    content,
    filled,
    key,
)

KEYS = [key(n) for n in range(4)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Told:
    return Told(clock)


def guard(store: Told, **settings: float) -> GuardedBackend:
    """A guard that never retries unless told to."""
    config = GuardConfig.model_validate({"retries": 0, "min_calls": 4, **settings})
    return GuardedBackend(store, config, store.clock, store.clock.sleep, random.Random(1))


def fail(backend: GuardedBackend, times: int) -> None:
    for _ in range(times):
        with pytest.raises(BackendError):
            backend.batch_exists(KEYS)


def opened(store: Told, **settings: float) -> GuardedBackend:
    """A guard whose breaker has just opened, on a store that works again."""
    backend = guard(store, **settings)
    store.always = BackendUnavailable("connection refused")
    fail(backend, 4)
    store.always = None
    assert backend.status().state is BreakerState.OPEN
    store.n_calls = 0
    return backend


class InThread:
    """A call that stays inside the store until it is let go."""

    def __init__(self, store: Told, call: Callable[[], object]) -> None:
        self.store = store
        store.inside, store.may_go = threading.Event(), threading.Event()
        self.may_go = store.may_go
        self.thread = threading.Thread(target=call)
        self.thread.start()
        assert store.inside.wait(20)
        store.inside = None

    def let_go(self) -> None:
        self.may_go.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def hang(store: Told) -> Iterator[Callable[[Callable[[], object]], InThread]]:
    calls: list[InThread] = []

    def start(call: Callable[[], object]) -> InThread:
        calls.append(InThread(store, call))
        return calls[-1]

    yield start
    for call in calls:
        call.let_go()


def test_a_guard_looks_like_what_it_guards(store: Told) -> None:
    backend = guard(store)
    assert backend.name == "told"
    assert backend.capability(Listable) is not None
    assert backend.capability(Clearable) is None


OTHER_CALLS: dict[str, Callable[[Any], object]] = {
    "list": lambda backend: list(required(backend, Listable).list_keys("")),
    "clear": lambda backend: required(backend, Clearable).clear(""),
    "pin": lambda backend: required(backend, Pins).pin(KEYS, 60.0),
    "usage": lambda backend: required(backend, ReportsUsage).usage(),
}


class Able(Told):
    """Can do what a guard guards beside the calls of requests."""

    def clear(self, prefix: str) -> int:
        self._call()
        return len(prefix)

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        self._call()
        return len(keys) if ttl_s else 0

    def usage(self) -> Mapping[str, int]:
        self._call()
        return {"": 1}


@pytest.mark.parametrize("operation", OTHER_CALLS)
def test_other_calls_are_counted_and_refused_while_the_breaker_is_open(
    clock: Clock, operation: str
) -> None:
    store, call = Able(clock), OTHER_CALLS[operation]
    backend = guard(store, open_s=5)
    store.takes_s = 0.5
    assert call(backend) == call(store)
    assert backend.status().operations[operation].latency_s.total == 0.5
    store.takes_s = 0.0
    store.always = BackendUnavailable("connection refused")
    with pytest.raises(BackendUnavailable):
        call(backend)
    assert backend.status().errors == {(operation, "BackendUnavailable"): 1}
    fail(backend, 4)
    n_calls = store.n_calls
    with pytest.raises(BreakerOpen):
        call(backend)
    assert (store.n_calls, backend.status().short_circuits) == (n_calls, 1)
    store.always = None
    clock.now += 5
    assert call(backend) == call(store)
    assert backend.status().state is BreakerState.OPEN, "requests decide whether it closes"


@pytest.mark.parametrize("operation", OTHER_CALLS)
def test_the_breaker_does_not_judge_by_other_calls(clock: Clock, operation: str) -> None:
    store, call = Able(clock), OTHER_CALLS[operation]
    backend = guard(store, retries=2)
    store.takes_s = 3600.0
    for _ in range(10):
        call(backend)
    store.always = BackendTimeout("no answer")
    for _ in range(10):
        with pytest.raises(BackendTimeout):
            call(backend)
    assert (backend.status().state, backend.status().retries) == (BreakerState.CLOSED, 0)


def test_a_healthy_store_is_asked_each_time_and_its_answers_pass_through(store: Told) -> None:
    backend = guard(store)
    assert backend.batch_set(KEYS[:3], filled(KEYS[:3])) == 3
    assert backend.batch_exists(KEYS) == 3
    pages = blank(3)
    assert backend.batch_get(KEYS[:3], pages) == 3
    assert pages == filled(KEYS[:3])
    backend.set(KEYS[3], content(KEYS[3]))
    assert backend.get(KEYS[3]) == content(KEYS[3])
    assert backend.exists(KEYS[3])
    backend.delete([KEYS[3]])
    assert not backend.exists(KEYS[3])
    assert store.n_calls == 8


def test_the_breaker_opens_at_the_error_rate_and_then_asks_nobody(store: Told) -> None:
    backend = guard(store, error_rate=0.5)
    for _ in range(3):
        backend.batch_exists(KEYS)
    store.always = BackendUnavailable("connection refused")
    fail(backend, 2)
    assert backend.status().state is BreakerState.CLOSED, "2 of 5 is less than half"
    fail(backend, 1)
    assert backend.status().state is BreakerState.OPEN
    n_calls = store.n_calls
    with pytest.raises(BreakerOpen) as caught:
        backend.batch_get(KEYS, blank(4))
    for part in ("told", "connection refused", "open for 0.0 s", "next probe is due in 5.0 s"):
        assert part in str(caught.value)
    assert store.n_calls == n_calls
    assert backend.status().short_circuits == 1


def test_old_failures_slide_out_of_the_window(store: Told, clock: Clock) -> None:
    backend = guard(store, window_s=10)
    store.errors = [BackendUnavailable("lost")] * 3
    fail(backend, 3)
    clock.now += 10
    store.errors = [BackendUnavailable("lost")] * 3
    fail(backend, 3)
    assert backend.status().state is BreakerState.CLOSED
    store.errors = [BackendUnavailable("lost")]
    fail(backend, 1)
    assert backend.status().state is BreakerState.OPEN


def test_a_miss_and_a_full_store_are_answers(store: Told) -> None:
    backend = guard(store)
    store.room = 0
    for _ in range(8):
        assert backend.batch_exists(KEYS) == 0
        assert backend.batch_set(KEYS, filled(KEYS)) == 0
        with pytest.raises(BackendFull):
            backend.set(KEYS[0], b"x")
    assert backend.status().state is BreakerState.CLOSED


def test_the_breaker_opens_when_calls_are_slow_for_their_bytes(store: Told) -> None:
    backend = guard(store, slow_s=1.0, slow_per_gib_s=0.0, slow_rate=1.0, deadline_base_s=100)
    store.takes_s = 0.9
    for _ in range(6):
        backend.batch_exists(KEYS)
    assert backend.status().state is BreakerState.CLOSED
    backend = guard(store, slow_s=1.0, slow_per_gib_s=0.0, slow_rate=1.0, deadline_base_s=100)
    store.takes_s = 1.1
    for _ in range(4):
        backend.batch_exists(KEYS)
    assert backend.status().state is BreakerState.OPEN
    large = guard(store, slow_s=1.0, slow_per_gib_s=2.0**30 / NBYTES, deadline_base_s=100)
    large.batch_set(KEYS, filled(KEYS))
    for _ in range(8):
        large.batch_get(KEYS, blank(4))
    assert large.status().state is BreakerState.CLOSED, "5 s are allowed for 4 pages"


def test_a_store_that_hangs_opens_the_breaker_while_no_call_has_come_back(
    store: Told, clock: Clock, hang: Callable[[Callable[[], object]], InThread]
) -> None:
    backend = guard(store, deadline_base_s=2.0)
    call = hang(lambda: backend.batch_exists(KEYS))
    clock.now += 1.7
    assert backend.batch_exists(KEYS) == 0
    call.let_go()
    assert backend.status().state is BreakerState.CLOSED
    call = hang(lambda: backend.batch_exists(KEYS))
    clock.now += 1.8
    assert backend.status().state is BreakerState.CLOSED, "nobody has called since"
    with pytest.raises(BreakerOpen, match=r"exists has not returned for 1\.8 s"):
        backend.batch_exists(KEYS)
    assert (backend.status().n_in_flight, backend.status().n_hanging) == (1, 1)
    call.let_go()
    assert backend.status().n_in_flight == 0
    assert backend.status().state is BreakerState.OPEN, "it came too late to count"


def test_one_hanging_call_beside_others_that_succeed_is_one_failure(
    store: Told, clock: Clock, hang: Callable[[Callable[[], object]], InThread]
) -> None:
    backend = guard(store, min_calls=100)
    hang(lambda: backend.batch_exists(KEYS))
    clock.now += 1
    backend.batch_exists(KEYS)
    clock.now += 100
    for _ in range(5):
        backend.batch_exists(KEYS)
    assert backend.status().state is BreakerState.CLOSED
    assert backend.status().n_hanging == 1


def test_a_dead_store_costs_one_deadline_a_breaker_window(store: Told, clock: Clock) -> None:
    """Every call hangs for its deadline and raises: one goes through in each open time."""
    backend = guard(store, open_s=5, max_open_s=5, deadline_base_s=2)
    store.always, store.takes_s = BackendTimeout("no answer"), 2.0
    start = clock.now
    while clock.now < start + 700:
        with pytest.raises(BackendError):
            backend.batch_exists(KEYS)
        clock.now += 0.05
    assert store.n_calls == pytest.approx(700 / 7, abs=2)


def test_half_open_lets_one_probe_through_and_its_success_closes(
    store: Told, clock: Clock, hang: Callable[[Callable[[], object]], InThread]
) -> None:
    backend = opened(store)
    clock.now += 5
    probe = hang(lambda: backend.batch_exists(KEYS))
    with pytest.raises(BreakerOpen, match="a probe is running"):
        backend.batch_exists(KEYS)
    assert backend.status().state is BreakerState.HALF_OPEN
    probe.let_go()
    assert backend.status().state is BreakerState.CLOSED
    assert backend.batch_exists(KEYS) == 0
    assert backend.status().state_changes == {"closed": 1, "open": 1, "half_open": 1}


def test_a_probe_that_fails_is_slow_or_hangs_keeps_it_open_twice_as_long(
    store: Told, clock: Clock, hang: Callable[[Callable[[], object]], InThread]
) -> None:
    backend = opened(store, open_s=5, max_open_s=30)
    clock.now += 5
    store.errors = [BackendUnavailable("lost")]
    fail(backend, 1)
    assert backend.status().next_probe_s == 10
    clock.now += 10
    store.takes_s = 1.5
    backend.batch_exists(KEYS)
    store.takes_s = 0
    assert backend.status().next_probe_s == 20
    clock.now += 20
    probe = hang(lambda: backend.batch_exists(KEYS))
    clock.now += 2
    with pytest.raises(BreakerOpen):
        backend.batch_exists(KEYS)
    assert backend.status().next_probe_s == 30, "max_open_s"
    probe.let_go()
    clock.now += 30
    backend.batch_exists(KEYS)
    assert backend.status().state is BreakerState.CLOSED
    store.always = BackendUnavailable("lost")
    fail(backend, 4)
    assert backend.status().next_probe_s == 5, "a success starts the doubling anew"


def test_several_probes_must_all_succeed(store: Told, clock: Clock) -> None:
    backend = opened(store, half_open_probes=2)
    clock.now += 5
    backend.batch_exists(KEYS)
    assert backend.status().state is BreakerState.HALF_OPEN
    backend.batch_exists(KEYS)
    assert backend.status().state is BreakerState.CLOSED


@pytest.mark.parametrize("error", [BackendUnavailable("lost"), BackendTimeout("late")])
def test_what_may_pass_soon_is_retried_after_a_drawn_pause(
    store: Told, clock: Clock, error: BackendError
) -> None:
    backend = guard(store, retries=2, retry_base_s=0.1, retry_max_s=0.1)
    store.objects = {name: content(name) for name in KEYS}
    store.errors = [error, error]
    pages = blank(4)
    assert backend.batch_get(KEYS, pages) == 4
    assert pages == filled(KEYS)
    assert store.n_calls == 3
    assert len(set(clock.slept)) == 2
    assert all(0 <= pause <= 0.1 for pause in clock.slept)
    status = backend.status()
    assert (status.retries, status.errors) == (2, {("get", type(error).__name__): 2})
    assert status.operations["get"].latency_s.n == 3
    assert status.negative_keys == 0, "it was loaded in the end"


@pytest.mark.parametrize(
    "error",
    [
        BackendDenied("no"),
        BackendCorrupt("what"),
        BackendError("?"),
        BreakerOpen("open"),
        KeyError("bug"),
        BackendFull("full"),
    ],
)
def test_what_will_not_pass_soon_is_not_retried(store: Told, error: Exception) -> None:
    backend = guard(store, retries=5)
    store.errors = [error]
    with pytest.raises(type(error)):
        backend.set(KEYS[0], b"x")
    assert store.n_calls == 1


def test_retries_end_when_another_attempt_would_pass_the_deadline(store: Told) -> None:
    backend = guard(store, retries=9, deadline_base_s=2.0, retry_base_s=0.01, retry_max_s=0.01)
    store.always, store.takes_s = BackendUnavailable("lost"), 0.5
    fail(backend, 1)
    assert store.n_calls == 3, "a fourth attempt would end after 2 s, above 90 % of the deadline"


def test_a_probe_is_not_retried(store: Told, clock: Clock) -> None:
    backend = opened(store, retries=5)
    clock.now += 5
    store.errors = [BackendUnavailable("lost")]
    n_calls = store.n_calls
    fail(backend, 1)
    assert store.n_calls == n_calls + 1


def test_a_key_whose_load_failed_counts_as_absent_for_a_while(store: Told, clock: Clock) -> None:
    """An index that knows a page which cannot be read would keep a request busy for ever."""
    backend = guard(store, negative_ttl_s=10)
    store.objects = {name: content(name) for name in KEYS}
    store.unreadable = {KEYS[2]}
    assert backend.batch_exists(KEYS) == 4
    assert backend.batch_get(KEYS, blank(4)) == 2
    assert backend.batch_exists(KEYS) == 2
    n_calls = store.n_calls
    assert backend.batch_exists(KEYS[2:]) == 0
    assert not backend.exists(KEYS[2])
    assert store.n_calls == n_calls, "nobody was asked"
    status = backend.status()
    assert (status.negative_hits, status.negative_keys) == (2 + 2 + 1, 1)
    clock.now += 10
    assert backend.batch_exists(KEYS) == 4


@pytest.mark.parametrize("again", ["set", "batch_set", "set_each", "get", "batch_get", "get_each"])
def test_a_failed_key_counts_again_once_it_is_stored_or_loaded(store: Told, again: str) -> None:
    backend = guard(store)
    store.objects = {KEYS[0]: content(KEYS[0])}
    store.unreadable = {KEYS[0]}
    assert backend.get(KEYS[0]) is None
    assert not backend.exists(KEYS[0])
    store.unreadable.clear()
    if again == "set":
        backend.set(KEYS[0], content(KEYS[0]))
    elif again == "batch_set":
        backend.batch_set(KEYS[:1], filled(KEYS[:1]))
    elif again == "set_each":
        backend.set_each(KEYS[:1], filled(KEYS[:1]))
    elif again == "get_each":
        assert list(backend.get_each(KEYS[:1], blank(1))) == [True]
    elif again == "get":
        assert backend.get(KEYS[0]) == content(KEYS[0])
    else:
        assert backend.batch_get(KEYS[:1], blank(1)) == 1
    assert backend.exists(KEYS[0])


def test_a_load_that_raised_poisons_its_first_key_and_one_that_the_breaker_refused_none(
    store: Told, clock: Clock
) -> None:
    backend = guard(store)
    store.objects = {name: content(name) for name in KEYS}
    store.errors = [BackendCorrupt("no page")]
    with pytest.raises(BackendCorrupt):
        backend.batch_get(KEYS, blank(4))
    assert backend.batch_exists(KEYS) == 0
    assert backend.batch_exists(KEYS[1:]) == 3
    refused = opened(store)
    for call in (lambda: refused.batch_get(KEYS, blank(4)), lambda: refused.get(KEYS[1])):
        with pytest.raises(BreakerOpen):
            call()
    clock.now += 5
    assert refused.batch_exists(KEYS) == 4


def test_one_question_for_each_key_is_one_question_to_the_store(clock: Clock) -> None:
    store = TellsEach(clock)
    backend = guard(store)
    store.room = 2
    assert list(backend.set_each(KEYS, filled(KEYS))) == [True, True, False, False]
    del store.objects[KEYS[0]]
    assert list(backend.exists_each(KEYS)) == [False, True, False, False]
    pages = blank(4)
    assert list(backend.get_each(KEYS, pages)) == [False, True, False, False]
    assert pages[1] == filled(KEYS)[1]
    assert store.n_calls == 3
    operations = backend.status().operations
    assert [operations[name].latency_s.n for name in ("exists", "get", "set")] == [1, 1, 1]
    assert [operations[name].nbytes.total for name in ("get", "set")] == [NBYTES, 2 * NBYTES]


def test_of_each_key_only_those_whose_load_failed_are_not_asked_for(clock: Clock) -> None:
    store = TellsEach(clock)
    backend = guard(store, negative_ttl_s=10)
    store.objects = {name: content(name) for name in KEYS}
    store.unreadable = {KEYS[1], KEYS[2]}
    assert list(backend.get_each(KEYS, blank(4))) == [True, False, False, True]
    assert backend.status().negative_keys == 2
    assert list(backend.exists_each(KEYS)) == [True, False, False, True]
    assert store.asked == [KEYS[0], KEYS[3]]
    n_calls = store.n_calls
    assert list(backend.exists_each(KEYS[1:3])) == [False, False]
    assert store.n_calls == n_calls, "nobody was asked"
    assert backend.status().negative_hits == 4
    store.unreadable.clear()
    assert list(backend.get_each(KEYS[:2], blank(2))) == [True, True]
    assert list(backend.exists_each(KEYS)) == [True, True, False, True]
    clock.now += 10
    assert list(backend.exists_each(KEYS)) == [True] * 4
    assert backend.status().negative_keys == 0


def test_a_load_of_each_that_raised_poisons_every_key(clock: Clock) -> None:
    store = TellsEach(clock)
    backend = guard(store)
    store.objects = {name: content(name) for name in KEYS}
    store.errors = [BackendCorrupt("no page")]
    with pytest.raises(BackendCorrupt):
        backend.get_each(KEYS[:3], blank(3))
    assert list(backend.exists_each(KEYS)) == [False, False, False, True]
    refused = opened(store)
    each_call: list[Callable[[], object]] = [
        lambda: refused.exists_each(KEYS),
        lambda: refused.get_each(KEYS, blank(4)),
        lambda: refused.set_each(KEYS, filled(KEYS)),
    ]
    for call in each_call:
        with pytest.raises(BreakerOpen):
            call()
    clock.now += 5
    assert list(refused.exists_each(KEYS)) == [True] * 4


def test_failed_keys_are_bounded_and_the_oldest_is_forgotten_first(store: Told) -> None:
    backend = guard(store, negative_max_keys=2)
    for name in KEYS[:3]:
        assert backend.get(name) is None
        store.objects[name] = content(name)
    assert backend.status().negative_keys == 2
    assert [backend.exists(name) for name in KEYS[:3]] == [True, False, False]


def test_a_corrupt_page_that_was_removed_and_rewritten_is_read_again(clock: Clock) -> None:
    """The whole way: the seal refuses and deletes it, the guard forgets it when it is stored."""
    memory = MemoryBackend(MemoryConfig(), CONTEXT)
    memory.open()
    backend = GuardedBackend(SealedBackend(memory), GuardConfig(), clock, clock.sleep)

    def page(payload: bytes) -> list[memoryview]:
        return [memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(payload))]

    assert backend.batch_set(KEYS[:1], [page(b"good")]) == 1
    stored = bytearray(memory.get(KEYS[0]) or b"")
    stored[-1] ^= 1
    memory.set(KEYS[0], stored)
    assert backend.batch_exists(KEYS[:1]) == 1
    assert backend.batch_get(KEYS[:1], [page(b"----")]) == 0
    assert backend.batch_exists(KEYS[:1]) == 0
    assert backend.batch_set(KEYS[:1], [page(b"good")]) == 1
    target = page(b"----")
    assert backend.batch_exists(KEYS[:1]) == 1
    assert backend.batch_get(KEYS[:1], [target]) == 1
    assert bytes(target[1]) == b"good"


def test_batches_count_their_pages_and_their_bandwidth(store: Told) -> None:
    """Pages that did not move are not among them, and a batch without any is none."""
    backend = guard(store)
    store.takes_s = 0.5
    backend.batch_set(KEYS[:3], filled(KEYS[:3]))
    backend.batch_get(KEYS, blank(4))
    backend.batch_get(KEYS[3:], blank(1))
    for name in ("get", "set"):
        calls = backend.status().operations[name]
        assert (calls.pages.n, calls.pages.total) == (1, 3)
        assert calls.gib_per_s.total == pytest.approx(3 * NBYTES / 2**30 / 0.5)


def test_histograms_count_each_call_and_the_bytes_that_moved(store: Told) -> None:
    backend = guard(store)
    store.takes_s = 0.03
    backend.batch_set(KEYS[:3], filled(KEYS[:3]))
    backend.batch_get(KEYS, blank(4))
    get = backend.status().operations["get"]
    assert (get.latency_s.n, get.nbytes.n, get.nbytes.total) == (1, 1, 3 * NBYTES)
    assert get.latency_s.total == pytest.approx(0.03)
    (bucket,) = [n for n, count in enumerate(get.latency_s.counts) if count]
    bounds = get.latency_s.bounds
    assert bounds[bucket - 1] < 0.03 <= bounds[bucket]
    assert backend.status().operations["delete"].latency_s.n == 0


def test_many_threads_lose_no_count(store: Told) -> None:
    backend = guard(store)

    def ask() -> None:
        for _ in range(200):
            backend.batch_exists(KEYS)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status = backend.status()
    assert (status.operations["exists"].latency_s.n, status.n_in_flight) == (800, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"open_s": 9, "max_open_s": 8},
        {"retry_base_s": 2, "retry_max_s": 1},
        {"error_rate": 0},
        {"error_rate": 1.1},
        {"window": 1},
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GuardConfig.model_validate(settings)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in GuardConfig.model_fields.values())
