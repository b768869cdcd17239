"""Windows over counters, and the alarm for a cache that only writes."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.observe.metrics import CacheCollector
from hicache_core.observe.snapshot import CacheSnapshot, OperationStatus
from hicache_core.observe.windows import HitRate, Watch, Window, WriteOnlyAlarm
from tests.unit.observe.worlds import backend, full_snapshot, histogram

GIB = 1 << 30


def storage(stored: int, loaded: int, asked: int) -> CacheSnapshot:
    questions = OperationStatus("exists", histogram(*[0.002] * asked))
    one = backend(stored_nbytes=stored, loaded_nbytes=loaded, operations=(questions,))
    return full_snapshot(backends=(one,))


def alarm() -> WriteOnlyAlarm:
    return WriteOnlyAlarm(window_s=600.0, min_stored_nbytes=GIB, min_questions=10)


def test_a_cache_that_only_writes_raises_the_alarm() -> None:
    watch = alarm()
    assert not watch.update(0.0, storage(0, 0, 0))
    assert not watch.update(100.0, storage(GIB - 1, 0, 9)), "it took little"
    assert not watch.update(200.0, storage(5 * GIB, 0, 9)), "it was hardly asked"
    assert watch.update(300.0, storage(5 * GIB, 0, 10))


def test_one_byte_back_ends_the_alarm() -> None:
    watch = alarm()
    watch.update(0.0, storage(0, 0, 0))
    assert watch.update(100.0, storage(5 * GIB, 0, 50))
    assert not watch.update(110.0, storage(6 * GIB, 1, 60))
    assert not watch.raised


def test_what_was_before_the_window_does_not_count() -> None:
    watch = alarm()
    watch.update(0.0, storage(0, 0, 0))
    assert watch.update(100.0, storage(5 * GIB, 0, 50))
    assert watch.update(690.0, storage(5 * GIB, 0, 90))
    assert not watch.update(710.0, storage(5 * GIB, 0, 99)), "nothing was stored for 600 s"


def test_loads_of_long_ago_do_not_hide_that_it_only_writes_now() -> None:
    watch = alarm()
    watch.update(0.0, storage(9 * GIB, 7 * GIB, 500))
    assert watch.update(300.0, storage(11 * GIB, 7 * GIB, 520))


def test_a_backend_that_was_swapped_starts_the_window_anew() -> None:
    watch = alarm()
    watch.update(0.0, storage(50 * GIB, 0, 5))
    assert not watch.update(100.0, storage(2 * GIB, 0, 50))
    assert watch.update(200.0, storage(4 * GIB, 0, 70))


def test_the_log_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = alarm()
    with caplog.at_level(logging.WARNING, "hicache_core"):
        for second in range(0, 500, 100):
            watch.update(second, storage(second * GIB, 0, second))
    assert watch.raised
    said = [record.message.split(":")[0] for record in caplog.records]
    assert said == ["storage is only written to"]


def test_the_alarm_is_a_series() -> None:
    now = [0.0]
    looks = iter([storage(0, 0, 0), storage(5 * GIB, 0, 50)])
    collector = CacheCollector(Watch(lambda: next(looks), alarm=alarm(), clock=lambda: now[0]))

    def value() -> float:
        (family,) = (f for f in collector.collect() if f.name == "hicache:storage_write_only")
        return family.samples[0].value

    assert value() == 0
    now[0] = 60.0
    assert value() == 1


def test_the_hit_rate_is_that_of_the_last_minute() -> None:
    rate = HitRate(window_s=60.0)

    def at(now: float, hits: int, missed: int) -> float:
        return rate.update(
            now, full_snapshot(hit_tokens={"host": hits}, counters={"missed_tokens": missed})
        )

    assert at(0.0, 0, 0) == 0.0
    assert at(30.0, 0, 100) == 0.0
    assert at(60.0, 100, 100) == 0.5
    assert at(100.0, 200, 100) == 1.0, "the misses were before the last minute"
    assert at(500.0, 200, 100) == 0.0, "nothing was asked lately"


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.integers(0, 100)), min_size=1, max_size=200))
def test_a_window_covers_its_time_and_little_more(steps: list[tuple[float, int]]) -> None:
    """What it says lies between the growth within the window and that within a step more."""
    window, window_s = Window(60.0), 60.0
    now, value, seen = 0.0, 0, []
    for pause, more in steps:
        now, value = now + pause, value + more
        seen.append((now, value))
        (growth,) = window.growth(now, (value,))
        began = max(t for t, _ in seen if t <= max(now - window_s, seen[0][0]))
        newest = max(v for t, v in seen if t <= began)
        at_most = value - min(v for t, v in seen if t >= began - window_s / 60 - 20.0)
        assert value - newest <= growth <= at_most
