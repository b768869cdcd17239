"""Fault injection does what it says, the same in every run."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from hicache_core.errors import BackendTimeout, BackendUnavailable
from hicache_core.storage.base import Clearable, Listable, StorageBackend
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.testing.faults import CorruptBackend, FlakyBackend, SlowBackend, StuckBackend
from hicache_core.types import BackendContext

KEYS = [f"{n:016x}/{n:064x}" for n in range(50)]


def memory() -> MemoryBackend:
    """An opened backend that holds every key."""
    backend = MemoryBackend(MemoryConfig(), BackendContext("0" * 16))
    backend.open()
    for key in KEYS:
        backend.set(key, key.encode())
    return backend


def errors(backend: StorageBackend, keys: list[str]) -> dict[str, list[bool]]:
    """Which of three calls for each key raise."""
    told: dict[str, list[bool]] = {key: [] for key in keys}
    for key in keys * 3:
        try:
            backend.get(key)
        except BackendUnavailable:
            told[key].append(True)
        else:
            told[key].append(False)
    return told


def test_the_seed_decides_which_calls_fail_and_their_order_does_not() -> None:
    shuffled = KEYS.copy()
    random.Random(1).shuffle(shuffled)
    first = errors(FlakyBackend(memory(), error_rate=0.3, seed=7), KEYS)
    assert first == errors(FlakyBackend(memory(), error_rate=0.3, seed=7), shuffled)
    assert first != errors(FlakyBackend(memory(), error_rate=0.3, seed=8), KEYS)
    n_failed = sum(map(sum, first.values()))
    assert 20 < n_failed < 70


def test_flaky_raises_what_it_is_told_to_and_asks_nobody() -> None:
    inner = memory()
    backend = FlakyBackend(inner, error_rate=1.0, error=BackendTimeout)
    with pytest.raises(BackendTimeout, match="injected fault: delete of 1 keys"):
        backend.delete(KEYS[:1])
    assert inner.exists(KEYS[0])


def test_corrupt_flips_one_bit_of_what_is_read_and_none_of_what_is_stored() -> None:
    inner = memory()
    for read in (0, 1):
        backend = CorruptBackend(inner, seed=3)
        page = (memoryview(bytearray(1)), memoryview(bytearray(len(KEYS[0]) - 1)))
        assert backend.batch_get(KEYS[:1], [page]) == 1
        value = backend.get(KEYS[0]) if read else b"".join(page)
        assert value is not None
        flipped = [a ^ b for a, b in zip(bytes(value), KEYS[0].encode(), strict=True) if a != b]
        assert len(flipped) == 1
        assert flipped[0].bit_count() == 1
    again = [CorruptBackend(inner, seed=3).get(key) for key in KEYS]
    assert again == [CorruptBackend(inner, seed=3).get(key) for key in KEYS]
    assert inner.get(KEYS[0]) == KEYS[0].encode()


def test_corrupt_leaves_a_share_of_the_objects_alone() -> None:
    backend = CorruptBackend(memory(), rate=0.5, seed=1)
    n_right = sum(backend.get(key) == key.encode() for key in KEYS)
    assert 10 < n_right < 40


def test_slow_waits_for_the_latency_and_for_the_bytes() -> None:
    slept: list[float] = []
    backend = SlowBackend(memory(), latency_s=0.5, bytes_per_s=1000, sleep=slept.append)
    backend.exists(KEYS[0])
    backend.set(KEYS[0], b"x" * 2000)
    backend.batch_get(KEYS[:2], [(memoryview(bytearray(250)),)] * 2)
    assert slept == [0.5, 2.5, 1.0]


def test_stuck_calls_wait_until_release_and_are_made_then() -> None:
    backend = StuckBackend(memory())
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(backend.get, key) for key in KEYS[:2]]
        assert backend.wait_for_calls(2, timeout_s=10)
        assert not any(call.done() for call in calls)
        backend.release()
        assert [call.result(10) for call in calls] == [key.encode() for key in KEYS[:2]]
    assert backend.n_waiting == 0
    assert backend.exists(KEYS[0])


def test_a_call_for_each_key_meets_one_fault() -> None:
    slept: list[float] = []
    slow = SlowBackend(memory(), latency_s=0.5, bytes_per_s=1000, sleep=slept.append)
    pages = [(memoryview(bytearray(len(key))),) for key in KEYS[:3]]
    assert list(slow.get_each(KEYS[:3], pages)) == [True] * 3
    assert list(slow.exists_each(["0/0", KEYS[0], "0/1"])) == [False, True, False]
    assert list(slow.set_each(KEYS[:3], pages)) == [True] * 3
    assert slept == [0.5 + 0.081 * 3, 0.5, 0.5 + 0.081 * 3]
    corrupt = CorruptBackend(memory(), seed=3)
    assert list(corrupt.exists_each(["0/0", KEYS[0]])) == [False, True]
    mask = corrupt.get_each(["0/0", *KEYS[:2]], pages)
    assert list(mask) == [False, True, True]
    for key, (segment,) in zip(KEYS[:2], pages[1:], strict=True):
        n_wrong = sum(a != b for a, b in zip(segment, key.encode(), strict=True))
        assert n_wrong == 1
    backend = FlakyBackend(memory(), error_rate=1.0)
    with pytest.raises(BackendUnavailable, match="injected fault: get_each of 3 keys"):
        backend.get_each(KEYS[:3], pages)


def test_only_a_store_that_may_be_stuck_makes_calls_unbounded() -> None:
    assert SlowBackend(memory()).bounds_calls() is memory().bounds_calls()
    assert not StuckBackend(memory(), stuck=False).bounds_calls()


def test_a_faulty_backend_can_do_what_the_inner_one_can() -> None:
    backend = FlakyBackend(memory(), error_rate=0.0)
    assert backend.capability(Listable) is backend.inner
    assert backend.capability(Clearable) is backend.inner
    assert backend.name == "memory"
