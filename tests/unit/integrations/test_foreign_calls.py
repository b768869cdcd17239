"""Rules of an engine's memory: nothing touches it after an answer, and no answer is a guess."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pytest

from hicache_core.errors import BackendUnavailable
from hicache_core.integrations.foreign.store import Answer, ForeignStore
from hicache_core.storage.memory import MemoryBackend
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.testing.faults import CorruptBackend, FlakyBackend, StuckBackend
from hicache_core.types import Page
from tests.leaks import LeakWatch
from tests.no_threads import no_threads
from tests.unit.integrations.foreign_world import (
    NBYTES,
    PATTERN,
    answer_of,
    bytes_in,
    content,
    keys_of,
    memory,
    opened,
    page_of,
    pages_of,
    patterned,
)
from tests.unit.storage.threads import storage_threads

NAMES = range(6)
KEYS = keys_of(NAMES)
SHORT_S = 0.6


@pytest.fixture(autouse=True)
def _no_thread_and_no_descriptor_is_left() -> Iterator[None]:
    watch = LeakWatch()
    watch.start()
    yield
    assert watch.stop() == []


@pytest.fixture(params=["direct", "staged"])
def store(request: pytest.FixtureRequest) -> Iterator[ForeignStore]:
    made = opened(memory(), direct=request.param == "direct")
    yield made
    made.close()


@pytest.fixture
def stuck() -> Iterator[StuckBackend]:
    backend = StuckBackend(memory(), stuck=False)
    yield backend
    backend.release()


def test_what_is_written_is_found_and_read(store: ForeignStore) -> None:
    assert store.write(KEYS[::2], pages_of(NAMES[::2])).mask == [True] * 3
    expected = [True, False] * 3
    assert store.exists(KEYS).mask == expected
    assert answer_of(lambda done: store.submit_exists(KEYS, done)).mask == expected
    for read in (store.read, lambda k, p: answer_of(lambda d: store.submit_read(k, p, d))):
        pages = patterned(6)
        assert read(KEYS, pages).mask == expected
        for n in NAMES:
            wanted = content(n) if expected[n] else PATTERN * NBYTES
            assert bytes_in(pages[n]) == wanted
    assert answer_of(lambda d: store.submit_write(KEYS, pages_of(NAMES), d)).mask == [True] * 6
    assert store.exists(KEYS).n_leading == 6


def test_pages_of_every_length_pass_through_a_small_staging_memory() -> None:
    store = opened(memory(), n_threads=1, staging_nbytes=100_000)
    sizes = [1, 63, 64, 65, 4096, 50_000, 99_000, 1, 30_000, 70_000]
    pages = [page_of(content(n, size), 3) for n, size in enumerate(sizes)]
    keys = keys_of(range(len(sizes)))
    assert store.write(keys, pages).mask == [True] * len(sizes)
    into = [page_of(bytes(size), 2) for size in sizes]
    assert store.read(keys, into).mask == [True] * len(sizes)
    assert [bytes_in(page) for page in into] == [bytes_in(page) for page in pages]
    store.close()


def test_a_page_longer_than_the_staging_memory_is_answered_no_with_what_to_do() -> None:
    store = opened(memory(), n_threads=1, staging_nbytes=10_000)
    answer = store.write(KEYS[:1], [page_of(bytes(10_000))])
    assert answer.mask == [False]
    assert "raise staging_nbytes" in answer.error
    store.close()


def test_no_pages_are_no_call(store: ForeignStore) -> None:
    assert store.exists([]).mask == store.read([], []).mask == store.write([], []).mask == []
    assert answer_of(lambda done: store.submit_read([], [], done)).mask == []


def test_pages_that_do_not_fit_the_keys_are_a_mistake_of_the_caller(store: ForeignStore) -> None:
    with pytest.raises(ValueError, match="2 keys do not fit 1 pages"):
        store.read(KEYS[:2], patterned(1))


@pytest.mark.parametrize("way", ["blocking", "background"])
def test_a_staged_read_that_hangs_is_answered_and_never_touches_the_engines_pages(
    stuck: StuckBackend, way: str
) -> None:
    before = storage_threads()
    store = opened(stuck, deadline_s=SHORT_S, guarded=False)
    assert all(store.write(KEYS, pages_of(NAMES)).mask)
    stuck.stick()
    pages = patterned(6)
    if way == "blocking":
        answer = store.read(KEYS, pages)
    else:
        answer = answer_of(lambda done: store.submit_read(KEYS, pages, done))
    assert answer.mask == [False] * 6
    assert "has not answered within 0.6 s" in answer.error
    assert answer.elapsed_s >= SHORT_S
    assert store.n_in_flight == 0
    stuck.release()
    assert answer_of(lambda done: store.submit_exists(KEYS, done)).mask == [True] * 6
    store.close()
    deadline = time.monotonic() + 20
    while storage_threads() - before:  # the call that hung has ended
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert [bytes_in(page) for page in pages] == [PATTERN * NBYTES] * 6


def test_a_staged_question_that_hangs_is_answered_no(stuck: StuckBackend) -> None:
    store = opened(stuck, deadline_s=SHORT_S)
    stuck.stick()
    assert store.exists(KEYS).mask == [False] * 6
    stuck.release()
    store.close()


class HangsAfter(BackendWrapper):
    """Lets ``n`` reads pass, then hangs until ``go`` is set."""

    def __init__(self, inner: MemoryBackend, n: int) -> None:
        super().__init__(inner)
        self.n = n
        self.go = threading.Event()

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self.n -= 1
        if self.n < 0:
            self.go.wait()
        return self.inner.batch_get(keys, pages)


def test_what_has_arrived_by_the_deadline_is_in_the_answer() -> None:
    backend = HangsAfter(memory(), 1)
    # One thread with room for two pages: three chunks, the second of which hangs.
    store = opened(backend, deadline_s=SHORT_S, n_threads=1, staging_nbytes=2 * (NBYTES + 64))
    assert all(store.write(KEYS, pages_of(NAMES)).mask)
    pages = patterned(6)
    answer = store.read(KEYS, pages)
    assert answer.mask == [True, True, False, False, False, False]
    assert answer.error
    backend.go.set()
    store.close()
    wanted = [content(n) for n in (0, 1)] + [PATTERN * NBYTES] * 4
    assert [bytes_in(page) for page in pages] == wanted


def test_a_staged_write_that_hangs_stores_nothing_of_what_the_memory_holds_later() -> None:
    backend = memory()
    stuck = StuckBackend(backend, stuck=False)
    # Questions pass, so that the write hangs with its pages copied.
    stuck.batch_exists = backend.batch_exists  # type: ignore[method-assign]
    store = opened(stuck, deadline_s=SHORT_S)
    stuck.stick()
    pages = pages_of(NAMES)
    answer = store.write(KEYS, pages)
    assert answer.mask == [False] * 6
    for page in pages:  # the engine gives the memory to another request
        for segment in page:
            segment[:] = PATTERN * segment.nbytes
    stuck.release()
    into = patterned(6)
    reader = opened(backend, direct=True)
    deadline = time.monotonic() + 20
    while not all(reader.read(KEYS, into).mask):  # the late write arrives, and is right
        assert time.monotonic() < deadline
    assert [bytes_in(page) for page in into] == [content(n) for n in NAMES]
    store.close()


def test_a_write_that_waits_behind_hanging_ones_is_answered_too_and_never_starts() -> None:
    asked: list[str] = []

    class Noting(BackendWrapper):
        def batch_exists(self, keys: Sequence[str]) -> int:
            asked.extend(keys)
            return self.inner.batch_exists(keys)

    stuck = StuckBackend(memory())
    store = opened(Noting(stuck), deadline_s=SHORT_S, n_threads=1, guarded=False)
    answers: queue.Queue[Answer] = queue.Queue()
    for n in range(12):  # more than threads that may be replaced
        store.submit_write(keys_of([n]), pages_of([n]), answers.put)
    for _ in range(12):
        answer = answers.get(timeout=20)
        assert (answer.mask, bool(answer.error)) == ([False], True)
    assert store.n_in_flight == 0
    n_started = len(asked)
    assert 0 < n_started < 12
    stuck.release()
    assert store.write(keys_of(["last"]), pages_of(["last"])).mask == [True]
    assert asked[n_started:] == keys_of(["last"])
    store.close()


def test_a_call_that_waits_for_staging_memory_gives_up_when_those_that_hold_it_hang() -> None:
    stuck = StuckBackend(memory())
    long = 100 * NBYTES
    store = opened(
        stuck,
        deadline_s=0.01,
        per_gib_s=0.2 / NBYTES * 2**30,  # a page 0.2 s, the long one 20 s
        n_threads=2,
        staging_nbytes=(long + 200) // 2,
        guarded=False,
    )
    held: queue.Queue[Answer] = queue.Queue()
    store.submit_read(KEYS[:1], patterned(1), held.put)
    assert stuck.wait_for_calls(1, 20)
    started = time.monotonic()
    answer = store.read(KEYS[1:2], patterned(1, long))
    assert "1 calls that hang hold" in answer.error
    assert time.monotonic() - started < 10, "well before its own deadline"
    assert held.get(timeout=20).mask == [False]
    stuck.release()
    store.close()


def test_calls_are_refused_at_once_while_hanging_ones_hold_all_staging_memory(
    stuck: StuckBackend,
) -> None:
    store = opened(stuck, deadline_s=SHORT_S, n_threads=1, staging_nbytes=NBYTES + 64)
    assert store.write(KEYS[:1], pages_of([0])).mask == [True]
    stuck.stick()
    assert store.read(KEYS[:1], patterned(1)).mask == [False]
    started = time.monotonic()
    answer = store.read(KEYS[:1], patterned(1))
    assert answer.mask == [False]
    assert "no staging memory" in answer.error
    assert answer.elapsed_s < time.monotonic() - started + 1
    assert store.stats().n_without_staging == 1
    stuck.release()
    deadline = time.monotonic() + 20
    while store.read(KEYS[:1], patterned(1)).mask != [True]:
        assert time.monotonic() < deadline
    assert store.stats().staging_nbytes == 0
    store.close()


def test_a_direct_call_that_is_late_is_answered_when_nothing_touches_its_pages(
    stuck: StuckBackend,
) -> None:
    store = opened(stuck, direct=True, deadline_s=0.05)
    assert all(store.write(KEYS, pages_of(NAMES)).mask)
    stuck.stick()
    answers: queue.Queue[Answer] = queue.Queue()
    pages = patterned(6)
    store.submit_read(KEYS, pages, answers.put)
    assert stuck.wait_for_calls(1, 20)
    time.sleep(0.2)
    store.submit_exists(KEYS, lambda _: None)  # makes the store look at deadlines
    assert answers.empty()
    assert store.n_in_flight == 2
    stuck.release()
    assert answers.get(timeout=20).mask == [True] * 6
    assert [bytes_in(page) for page in pages] == [content(n) for n in NAMES]
    store.close()


def test_a_blocking_direct_call_runs_on_the_callers_thread_and_starts_none() -> None:
    class Noting(BackendWrapper):
        threads: ClassVar[list[int]] = []

        def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
            self.threads.append(threading.get_ident())
            return self.inner.batch_get(keys, pages)

    backend = Noting(memory())
    before = set(threading.enumerate())
    store = opened(backend, direct=True)
    assert all(store.write(KEYS, pages_of(NAMES)).mask)
    assert all(store.read(KEYS, patterned(6)).mask)
    assert set(backend.threads) == {threading.get_ident()}
    assert set(threading.enumerate()) == before
    store.close()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "staged"])
def test_a_damaged_page_is_never_claimed_and_its_bytes_do_not_stand(direct: bool) -> None:
    backend = memory()
    writer = opened(backend, direct=True)
    assert all(writer.write(KEYS, pages_of(NAMES)).mask)
    store = opened(CorruptBackend(backend, rate=0.5, seed=3), direct=direct)
    pages = patterned(6)
    mask = store.read(KEYS, pages).mask
    assert True in mask
    assert False in mask
    before = bytes(NBYTES) if direct else PATTERN * NBYTES
    for n, page in enumerate(pages):
        assert bytes_in(page) == (content(n) if mask[n] else before)
    assert sum(store.stats().refused.values()) == mask.count(False)
    store.close()


def test_a_damaged_page_whose_header_is_zeros_does_not_stand_either() -> None:
    backend = memory()
    backend.open()
    backend.set(KEYS[0], bytes(HEADER_NBYTES) + b"E" * NBYTES)
    store = opened(backend, direct=True)
    (page,) = patterned(1)
    assert store.read(KEYS[:1], [page]).mask == [False]
    assert bytes_in(page) == bytes(NBYTES)
    store.close()


def test_a_failing_store_is_an_answer() -> None:
    backend = FlakyBackend(memory(), error_rate=1.0, error=BackendUnavailable)
    for direct in (True, False):
        failing = opened(backend, direct=direct)
        for answer in (
            failing.exists(KEYS),
            failing.read(KEYS, patterned(6)),
            failing.write(KEYS, pages_of(NAMES)),
            answer_of(lambda done, s=failing: s.submit_read(KEYS, patterned(6), done)),
        ):
            assert answer.mask == [False] * 6
            assert "injected fault" in answer.error
        failing.close()


def test_an_on_done_that_raises_is_logged_and_kills_nothing(
    store: ForeignStore, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(answer: Answer) -> None:
        raise RuntimeError("of the engine")

    with caplog.at_level(logging.ERROR):
        for _ in range(8):  # more than threads
            store.submit_exists(KEYS, raises)
        assert answer_of(lambda done: store.submit_exists(KEYS, done)).mask == [False] * 6
        store.close()
    assert caplog.text.count("of the engine") >= 8


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "staged"])
def test_close_answers_what_waits_ends_all_threads_and_later_calls_are_no(direct: bool) -> None:
    before = set(threading.enumerate())
    stuck = StuckBackend(memory())
    store = opened(stuck, direct=direct, n_threads=1)
    answers: queue.Queue[Answer] = queue.Queue()
    for _ in range(4):
        store.submit_read(KEYS, patterned(6), answers.put)
    assert stuck.wait_for_calls(1, 20)
    closing = threading.Thread(target=store.close)
    closing.start()
    for _ in range(3):
        assert answers.get(timeout=20).mask == [False] * 6
    stuck.release()
    closing.join(20)
    answers.get(timeout=20)
    assert store.exists(KEYS).mask == store.write(KEYS, pages_of(NAMES)).mask == [False] * 6
    assert answer_of(lambda done: store.submit_read(KEYS, patterned(6), done)).mask == [False] * 6
    assert set(threading.enumerate()) <= before
    assert not storage_threads() - before


def test_close_does_not_wait_for_a_staged_call_that_was_given_up(stuck: StuckBackend) -> None:
    store = opened(stuck, deadline_s=0.05)
    stuck.stick()
    assert store.exists(KEYS).error
    started = time.monotonic()
    store.close(timeout_s=60)
    assert time.monotonic() - started < 30
    stuck.release()


def test_close_ends_although_a_staged_call_hangs(stuck: StuckBackend) -> None:
    store = opened(stuck)
    stuck.stick()
    answers: queue.Queue[Answer] = queue.Queue()
    pages = patterned(6)
    store.submit_read(KEYS, pages, answers.put)
    assert stuck.wait_for_calls(1, 20)
    store.close(timeout_s=0.1)
    answer = answers.get(timeout=20)
    assert (answer.mask, answer.error) == ([False] * 6, "the store is closed")
    stuck.release()


@pytest.mark.parametrize("name", ["hicache-storage", "hicache-deadlines"])
def test_a_system_without_threads_is_an_answer(name: str) -> None:
    store = opened(memory())
    with no_threads(name):
        answer = store.exists(KEYS)
    assert answer.mask == [False] * 6
    assert "no thread" in answer.error
    assert store.exists(KEYS).error == ""
    store.close()


def test_a_store_counts_what_it_was_asked_and_what_it_answered() -> None:
    store = opened(memory(), direct=True)
    assert all(store.write(KEYS[:4], pages_of(NAMES[:4])).mask)
    store.exists(KEYS)
    store.read(KEYS, patterned(6))
    stats = store.stats()
    assert (stats.write.n_calls, stats.write.n_pages, stats.write.n_yes) == (1, 4, 4)
    assert (stats.exists.n_pages, stats.exists.n_yes, stats.exists.nbytes) == (6, 4, 0)
    assert (stats.read.n_pages, stats.read.n_yes, stats.read.nbytes) == (6, 4, 4 * NBYTES)
    assert stats.read.elapsed_s > 0
    assert stats.read.n_failed == 0
    assert [status.breaker for status in stats.backends] == ["closed"]
    store.close()
    assert store.read(KEYS, patterned(6)).error
    assert store.stats().read.n_failed == 1


def test_calls_from_several_threads_get_their_own_answers(store: ForeignStore) -> None:
    assert all(store.write(KEYS, pages_of(NAMES)).mask)
    failures: list[object] = []

    def work(n: int) -> None:
        for _ in range(50):
            pages = patterned(1)
            answer = store.read([KEYS[n]], pages)
            if answer.mask != [True] or bytes_in(pages[0]) != content(n):
                failures.append(answer)

    threads = [threading.Thread(target=work, args=(n,)) for n in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
