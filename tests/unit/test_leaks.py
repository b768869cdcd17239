"""The leak detector finds each kind of leak, and costs a test next to nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from tests import leaks
from tests.leaks import LeakWatch
from tests.page_path.world import World, ids, make_world


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """What a watch says of what a function does."""
    monkeypatch.setattr(leaks, "PATIENCE_S", 0.05)

    def watched(act: Callable[[], object]) -> list[str]:
        watch = LeakWatch()
        watch.start()
        kept = act()
        wrong = watch.stop()
        del kept
        return wrong

    return watched


def leave_nothing() -> None:
    world = make_world(storage={})
    world.request(ids(33))
    world.close()


def leave_a_cache_open() -> World:
    return make_world()


def leave_a_lock() -> None:
    world = make_world()
    world.request(ids(8))
    world.cache.lock(world.cache.match_prefix(ids(8)).node)
    world.close()


def leave_pages() -> None:
    world = make_world()
    world.cache.allocate(3)
    world.close()


def test_a_world_that_is_closed_leaves_nothing(
    found: Callable[[Callable[[], object]], list[str]],
) -> None:
    assert found(leave_nothing) == []


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (leave_a_cache_open, "a cache was not closed"),
        (leave_a_lock, "at close: 1 locks were not taken back"),
        (leave_pages, "at close: 3 device pages were neither inserted nor freed"),
    ],
)
def test_what_is_left_of_a_cache_is_found(
    found: Callable[[Callable[[], object]], list[str]], leave: Callable[[], object], said: str
) -> None:
    assert found(leave) == [said]


def test_a_thread_that_goes_on_is_found(
    found: Callable[[Callable[[], object]], list[str]],
) -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait, name="hicache-left-behind")
    (said,) = found(thread.start)
    assert "hicache-left-behind" in said
    go_on.set()
    thread.join()


def test_a_descriptor_that_stays_open_is_found(
    found: Callable[[Callable[[], object]], list[str]],
) -> None:
    opened: list[int] = []
    (said,) = found(lambda: opened.extend(os.pipe()))
    assert "pipe" in said
    for fd in opened:
        os.close(fd)
