"""Shield: a signal that comes in the middle is heard at the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from hicache_core.process.shield import shield


class Stopped(Exception):
    """What the handler raises."""


def stop(number: int, frame: object) -> None:
    raise Stopped


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, stop)
    yield
    assert signal.signal(signal.SIGUSR1, before) is stop


def under_the_shield(*steps: Callable[[], object]) -> None:
    with shield:
        for step in steps:
            step()


def signal_comes() -> None:
    signal.raise_signal(signal.SIGUSR1)


def step_fails() -> None:
    raise ValueError("of the step")


def test_a_signal_waits_until_the_step_is_whole() -> None:
    done: list[str] = []
    with pytest.raises(Stopped):
        under_the_shield(signal_comes, partial(done.append, "whole"))
    assert done == ["whole"]


def test_only_the_outermost_lets_signals_go() -> None:
    done: list[str] = []
    inner = partial(under_the_shield, signal_comes)
    with pytest.raises(Stopped):
        under_the_shield(inner, partial(done.append, "whole"))
    assert done == ["whole"]


def test_ctrl_c_waits_too() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        under_the_shield(partial(signal.raise_signal, signal.SIGINT), partial(done.append, "whole"))
    assert done == ["whole"]


def test_an_error_of_the_step_is_not_lost() -> None:
    with pytest.raises(Stopped) as caught:
        under_the_shield(signal_comes, step_fails)
    assert isinstance(caught.value.__context__, ValueError)
    with pytest.raises(ValueError, match="of the step"):
        under_the_shield(step_fails)


def test_afterwards_signals_come_at_once() -> None:
    under_the_shield()
    with pytest.raises(Stopped):
        signal_comes()


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with shield:
            signal.raise_signal(signal.SIGUSR2)
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_on_another_thread_it_does_nothing() -> None:
    seen: list[object] = []

    def work() -> None:
        with shield:
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [stop]
