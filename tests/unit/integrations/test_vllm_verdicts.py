"""Remembered answers: asked once, shared by requests, and not kept for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hicache_core.integrations.vllm.verdicts import MAX_AGE_S, Verdicts

A, B = b"a", b"b"


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    return Clock()


@pytest.fixture
def verdicts(clock: Clock) -> Verdicts:
    return Verdicts(clock)


def test_a_key_is_asked_once_for_all_requests(verdicts: Verdicts) -> None:
    assert verdicts.look(A, "1") is None
    assert verdicts.look(A, "2") is None
    assert verdicts.take_questions() == [A]
    assert verdicts.look(A, "3") is None
    assert verdicts.take_questions() == []
    verdicts.answer([A], [True])
    assert [verdicts.look(A, request) for request in "123"] == [True] * 3


def test_a_verdict_goes_with_the_last_request_that_asked(verdicts: Verdicts) -> None:
    for request in "12":
        verdicts.look(A, request)
    verdicts.answer(verdicts.take_questions(), [False])
    verdicts.forget("1")
    assert verdicts.look(A, "2") is False
    verdicts.forget("2")
    assert len(verdicts) == 0
    assert verdicts.look(A, "3") is None  # another server may have stored it


def test_an_old_verdict_is_asked_again_while_its_request_lives(
    verdicts: Verdicts, clock: Clock
) -> None:
    verdicts.look(A, "1")
    verdicts.answer(verdicts.take_questions(), [False])
    clock.now = MAX_AGE_S
    assert verdicts.look(A, "1") is False
    clock.now += 0.1
    assert verdicts.look(A, "1") is None
    assert verdicts.take_questions() == [A]
    verdicts.answer([A], [True])
    assert verdicts.look(A, "1") is True


def test_what_a_read_showed_overrules_an_answer_on_its_way(
    verdicts: Verdicts, clock: Clock
) -> None:
    verdicts.look(A, "1")
    verdicts.answer(verdicts.take_questions(), [True])
    clock.now = 2 * MAX_AGE_S
    verdicts.look(A, "1")
    assert verdicts.take_questions() == [A]
    verdicts.note([A], present=False)
    verdicts.answer([A], [True])
    assert verdicts.look(A, "1") is False


def test_an_answer_for_requests_that_have_gone_is_dropped(verdicts: Verdicts) -> None:
    verdicts.look(A, "1")
    questions = verdicts.take_questions()
    verdicts.forget("1")
    verdicts.look(A, "2")
    verdicts.look(B, "2")
    assert verdicts.take_questions() == [B]  # A is on its way
    verdicts.forget("2")
    verdicts.answer(questions, [True])
    verdicts.answer([B], [True])
    assert len(verdicts) == 0


def test_what_nobody_asked_for_is_not_remembered(verdicts: Verdicts) -> None:
    verdicts.note([A], present=True)
    assert len(verdicts) == 0


KEYS = st.sampled_from([b"%d" % n for n in range(4)])
REQUESTS = st.sampled_from(["1", "2", "3"])


class VerdictMachine(RuleBasedStateMachine):
    """Any order of calls: nothing is asked twice at a time, and nothing stays behind."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.verdicts = Verdicts(self.clock)
        self.on_their_way: list[bytes] = []
        self.wanted: dict[str, set[bytes]] = {}

    @rule(key=KEYS, request=REQUESTS)
    def look(self, key: bytes, request: str) -> None:
        self.verdicts.look(key, request)
        self.wanted.setdefault(request, set()).add(key)

    @rule()
    def ask(self) -> None:
        keys = self.verdicts.take_questions()
        assert not set(keys) & set(self.on_their_way)
        assert len(set(keys)) == len(keys)
        self.on_their_way += keys

    @rule(present=st.booleans())
    def answer(self, present: bool) -> None:
        self.verdicts.answer(self.on_their_way, [present] * len(self.on_their_way))
        self.on_their_way = []

    @rule(key=KEYS, present=st.booleans())
    def note(self, key: bytes, present: bool) -> None:
        self.verdicts.note([key], present=present)
        if any(key in keys for keys in self.wanted.values()):
            assert self.verdicts.look(key, self._one_that_wants(key)) is present

    @rule(request=REQUESTS)
    def forget(self, request: str) -> None:
        self.verdicts.forget(request)
        self.wanted.pop(request, None)

    @rule(seconds=st.floats(0, 2 * MAX_AGE_S))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def only_what_is_wanted_or_on_its_way_is_kept(self) -> None:
        kept = set(self.on_their_way).union(*self.wanted.values())
        assert len(self.verdicts) == len(kept)

    def _one_that_wants(self, key: bytes) -> str:
        return next(request for request, keys in self.wanted.items() if key in keys)


TestVerdictMachine = VerdictMachine.TestCase
TestVerdictMachine.settings = settings(deadline=None)
