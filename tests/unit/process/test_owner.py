"""Owner: one thread calls, another one or a forked child hears of it at once."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

import pytest

from hicache_core.errors import WrongThread
from hicache_core.process.owner import Owner


def elsewhere(work: Callable[[], object]) -> BaseException | None:
    """What ``work`` raises on a thread of its own, which has ended then."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join()
    return raised[0] if raised else None


def in_a_child(work: Callable[[], str]) -> str:
    """What ``work`` returns in a child that was forked here."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # That other threads are not in the child is what these tests are about.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return text


def raised_by(work: Callable[[], object]) -> str:
    try:
        work()
    except WrongThread as error:
        return str(error)
    return "nothing"


def test_the_first_thread_that_calls_is_the_owner() -> None:
    owner = Owner("this cache")
    owner.check()
    error = elsewhere(owner.check)
    assert isinstance(error, WrongThread)
    assert "this cache belongs to thread 'MainThread', and 'another' calls it" in str(error)
    owner.check()


def test_who_made_it_may_be_another_thread_than_its_owner() -> None:
    owner = Owner("this cache")
    begun, done = threading.Event(), threading.Event()

    def own() -> None:
        owner.check()
        begun.set()
        done.wait(30)

    thread = threading.Thread(target=own)
    thread.start()
    begun.wait(30)
    with pytest.raises(WrongThread):
        owner.check()
    done.set()
    thread.join()
    owner.check()  # its thread has ended: nobody can be in its way


def test_the_owner_can_hand_it_over_and_nobody_else() -> None:
    owner = Owner("this cache")
    owner.check()
    assert isinstance(elsewhere(owner.hand_over), WrongThread)
    owner.hand_over()
    assert elsewhere(owner.check) is None


def test_a_forked_child_owns_nothing_of_its_parents() -> None:
    owner = Owner("this cache")
    owner.check()
    text = in_a_child(lambda: raised_by(owner.check))
    assert f"this cache was opened before this process was forked, and its threads are the parent's (pid {os.getpid()})" in text  # fmt: skip # noqa: E501
    owner.check()


def test_a_forked_child_may_open_its_own() -> None:
    assert in_a_child(lambda: raised_by(Owner("this cache").check)) == "nothing"
