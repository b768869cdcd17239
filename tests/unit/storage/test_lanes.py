"""Rules of splitting one call over threads."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.storage.lanes import SPLIT_NBYTES, Lanes
from tests.no_threads import no_threads


@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 20 * SPLIT_NBYTES))
def test_the_parts_cover_everything_once_and_in_order(lanes: int, n: int, nbytes: int) -> None:
    parts = Lanes(lanes, "test").split(n, nbytes)
    assert [i for part in parts for i in part] == list(range(n))
    assert 1 <= len(parts) <= lanes
    assert all(parts) or n == 0


def test_results_come_in_the_order_of_the_parts() -> None:
    lanes = Lanes(3, "test")
    parts = [range(2), range(2, 3), range(3, 9)]
    assert lanes.run(sum, parts) == [sum(part) for part in parts]
    lanes.close()
    assert lanes.run(sum, parts) == [sum(part) for part in parts], "in the caller once closed"


def test_no_part_is_still_running_when_run_raises() -> None:
    lanes = Lanes(2, "test")
    started, ended = threading.Event(), []

    def work(part: range) -> None:
        if part.start == 0:
            assert started.wait(20)
            raise KeyError("part 0")
        started.set()
        time.sleep(0.05)
        ended.append(part)

    with pytest.raises(KeyError):
        lanes.run(work, [range(1), range(1, 2)])
    assert ended == [range(1, 2)]
    lanes.close()


def test_close_ends_the_threads() -> None:
    before = threading.active_count()
    lanes = Lanes(4, "test")
    assert threading.active_count() == before, "none starts before it is needed"
    lanes.run(sum, [range(1)] * 4)
    lanes.close()
    assert threading.active_count() == before


def test_without_a_thread_the_caller_does_it_all_and_nobody_does_it_again_later() -> None:
    lanes = Lanes(2, "test-lanes")
    done: list[int] = []

    def work(part: range) -> int:
        done.append(part.start)
        return part.start

    with no_threads("test-lanes"):
        assert lanes.run(work, [range(1), range(1, 2)]) == [0, 1]
    assert lanes.run(work, [range(2, 3), range(3, 4)]) == [2, 3]
    lanes.close()
    assert sorted(done) == [0, 1, 2, 3]
