"""Answers per key: how many lead, and where they are yes."""

from __future__ import annotations

import pytest

from hicache_core.storage.answers import n_leading, yes_at


@pytest.mark.parametrize(
    ("answers", "n"), [([], 0), ([False, True], 0), ([True, False, True], 1), ([True, True], 2)]
)
def test_answers_lead_up_to_the_first_no(answers: list[bool], n: int) -> None:
    assert n_leading(answers) == n


def test_answers_are_yes_at_the_places_that_are_named() -> None:
    assert yes_at((3, 1), 4) == [False, True, False, True]
    assert yes_at((), 2) == [False, False]
