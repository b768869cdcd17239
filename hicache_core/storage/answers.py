"""Helpers for answers per key, which are sequences of bools in the order of the keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def n_leading(answers: Sequence[bool]) -> int:
    """Returns how many leading answers are yes: the index of the first no."""
    return answers.index(False) if False in answers else len(answers)


def yes_at(places: Iterable[int], n: int) -> list[bool]:
    """Returns ``n`` answers: yes at ``places``, no elsewhere."""
    answers = [False] * n
    for place in places:
        answers[place] = True
    return answers
