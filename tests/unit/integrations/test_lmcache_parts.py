"""Large calls of LMCache's adapter are cut into parts, and answered as one."""

from __future__ import annotations

from collections.abc import Sequence

from hicache_core.integrations.foreign.store import Answer, OnDone
from hicache_core.integrations.lmcache.parts import PART_NBYTES, submit_in_parts
from hicache_core.types import Page

HALF = memoryview(bytearray(PART_NBYTES // 2))


class Store:
    """Notes the calls; the test answers them."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], OnDone]] = []

    def submit(self, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone) -> None:
        assert len(keys) == len(pages)
        self.calls.append((list(keys), on_done))


def cut(n: int, n_threads: int) -> tuple[Store, list[Answer]]:
    store, answers = Store(), list[Answer]()
    keys = [str(key) for key in range(n)]
    submit_in_parts(store.submit, keys, [(HALF,)] * n, answers.append, n_threads=n_threads)
    return store, answers


def test_a_part_is_large_and_there_are_as_many_as_threads_at_most() -> None:
    sizes = [[len(keys) for keys, _ in cut(n, 4)[0].calls] for n in (0, 1, 3, 4, 7, 9, 100)]
    assert sizes == [[0], [1], [3], [2, 2], [2, 2, 3], [2, 2, 2, 3], [25] * 4]


def test_the_last_part_that_ends_answers_for_all_in_their_order() -> None:
    store, answers = cut(7, 4)
    assert [key for keys, _ in store.calls for key in keys] == list("0123456")
    for n, answer in (
        (2, Answer([True, False, True], elapsed_s=1.0)),
        (0, Answer([False, False], "the store is gone", elapsed_s=3.0)),
        (1, Answer([True, True], elapsed_s=2.0)),
    ):
        assert answers == []
        store.calls[n][1](answer)
    expected = [False, False, True, True, True, False, True]
    assert answers == [Answer(expected, "the store is gone", 3.0)]
