"""Age, pins and quotas in a metadata store, on each of the two."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hicache_hf3fs.metadata import (
    Found,
    Limits,
    MetadataStore,
    Slot,
    Wanted,
    Written,
    new_generation,
    oldest_generation,
)
from hicache_hf3fs.metadata_redis import RedisMetadata
from hicache_hf3fs.metadata_sqlite import SqliteMetadata
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.hf3fs.tests.helpers import key_of
from tests.servers.valkey import Valkey

SLAB, N_SLOTS = "r0.4096", 4
TTL_S = 0.3
A, B, C, D, E = (key_of(label) for label in "ABCDE")
HERE = A.partition("/")[0]
ELSEWHERE = HERE[::-1]
New = Callable[..., MetadataStore]


@pytest.fixture(params=["sqlite", "redis"])
def new(request: pytest.FixtureRequest, tmp_path: Path, valkey: Valkey) -> Iterator[New]:
    """Opens stores on one database that knows a slab of four slots."""
    made: list[MetadataStore] = []

    def new_store(**limits: Any) -> MetadataStore:
        all_limits = Limits(5.0, 0.01, 5.0, **limits)
        if request.param == "sqlite":
            made.append(SqliteMetadata(tmp_path / "index.sqlite", all_limits))
        else:
            made.append(RedisMetadata(valkey.url, tmp_path.name, all_limits))
        made[-1].open()
        made[-1].register(SLAB, N_SLOTS, [])
        return made[-1]

    yield new_store
    for store in made:
        store.check_integrity()
        store.close()


def elsewhere(key: str) -> str:
    """The same page of another namespace."""
    return f"{ELSEWHERE}/{key.partition('/')[2]}"


def write(store: MetadataStore, *keys: str, nbytes: int = 10) -> int:
    """Reserves and publishes; how many leading keys are stored."""
    slots = store.reserve(SLAB, [Wanted(key, nbytes) for key in keys])
    written = [Written(k, nbytes, s) for k, s in zip(keys, slots, strict=False) if s is not None]
    store.check_integrity()
    assert all(store.publish(written)) or not written
    store.check_integrity()
    return len(slots)


def present(store: MetadataStore, *keys: str) -> list[bool]:
    """Which of the keys are bound; grants no lease."""
    return [store.leading([key]) == 1 for key in keys]


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for what time alone brings."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


@settings(deadline=None)
@given(now=st.floats(1.7e9, 4e9), age=st.floats(0, 1e9), ttl_s=st.floats(0.001, 1e9))
def test_a_generation_knows_its_age_to_the_millisecond(
    now: float, age: float, ttl_s: float
) -> None:
    generation = new_generation(now - age)
    assert 0 < generation < 1 << 62
    is_young = generation >= oldest_generation(now, ttl_s)
    assert is_young == (age < ttl_s) or abs(age - ttl_s) <= 0.002
    assert generation >= oldest_generation(now, None)


def test_no_two_generations_of_one_moment_are_equal() -> None:
    assert len({new_generation(1.7e9) for _ in range(20)}) > 17


def test_an_expired_object_is_none_for_every_method(new: New) -> None:
    store = new(ttl_s=TTL_S)
    write(store, A, B)
    assert store.usage() == {HERE: 20}
    bindings = [binding for binding in store.lookup([A, B]) if binding is not None]
    wait_until(lambda: store.leading([A]) == 0)
    assert store.lookup([A, B]) == [None, None]
    assert store.unchanged([A, B], bindings) == store.present([A, B]) == [False, False]
    assert list(store.keys("")) == []
    assert store.pin([A, B], 60) == 0
    assert store.usage() == {}
    assert store.totals(SLAB).bound == 0


def test_an_expired_key_can_be_stored_again_and_is_young_then(new: New) -> None:
    store = new(ttl_s=TTL_S)
    write(store, A)
    wait_until(lambda: store.leading([A]) == 0)
    (slot,) = store.reserve(SLAB, [Wanted(A, 10)])
    assert slot is not None, "what is expired is not stored already"
    assert store.publish([Written(A, 10, slot)]) == [True]
    assert present(store, A) == [True]
    assert store.usage() == {HERE: 10}


def test_of_two_writers_the_second_replaces_what_expired_meanwhile(new: New) -> None:
    store = new(ttl_s=TTL_S)
    (late,) = store.reserve(SLAB, [Wanted(A, 10)])
    write(store, A)
    wait_until(lambda: store.leading([A]) == 0)
    (young,) = store.reserve(SLAB, [Wanted(A, 10)])
    assert late is not None
    assert young is not None
    assert store.publish([Written(A, 10, young)]) == [True]
    assert present(store, A) == [True]


def test_expired_objects_go_before_the_least_recently_used(new: New) -> None:
    store = new(ttl_s=60.0)
    now = time.time()
    old = Found(0, new_generation(now - 59.8), A, 10)
    young = [Found(n + 1, new_generation(now), key, 10) for n, key in enumerate((B, C, D))]
    store.register("r1.4096", N_SLOTS, [old, *young])
    while store.leading([A]) == 1:
        store.lookup([A])  # in use to the end, and expired all the same
    time.sleep(0.03)  # the last lease on it ends
    assert len(store.reserve("r1.4096", [Wanted(E, 10)])) == 1
    assert present(store, A, B, C, D) == [False, True, True, True]


def test_an_object_found_in_a_slab_is_as_old_as_its_generation(new: New) -> None:
    store = new(ttl_s=60.0)
    now = time.time()
    found = [Found(0, new_generation(now - 61), A, 10), Found(2, new_generation(now - 50), B, 10)]
    store.register("r1.4096", N_SLOTS, found)
    assert present(store, A, B) == [False, True]
    assert store.usage() == {HERE: 10}
    store.check_integrity()


def test_a_pinned_object_outlives_those_that_were_used_later(new: New) -> None:
    store = new()
    write(store, A)
    write(store, B)
    write(store, C, D)
    assert store.pin([A, E], 60) == 1
    assert write(store, E) == 1
    assert present(store, A, B, C, D, E) == [True, False, True, True, True]
    store.check_integrity()


def test_when_all_is_pinned_the_least_recently_used_goes(new: New) -> None:
    store = new()
    for key in (A, B, C, D):
        write(store, key)
    store.lookup([A])
    assert store.pin([D, C, B, A], 60) == 4
    time.sleep(0.02)
    assert write(store, E) == 1
    assert present(store, A, B, C, D, E) == [True, False, True, True, True]


def test_a_pin_ends_by_itself_and_leaves_the_order_of_use_as_it_was(new: New) -> None:
    store = new()
    for key in (A, B, C, D):
        write(store, key)
    store.pin([A], 0.05)
    time.sleep(0.06)
    assert write(store, E) == 1
    assert present(store, A, B, C, D, E) == [False, True, True, True, True]


def test_a_pin_of_zero_seconds_ends_it_and_a_second_pin_renews_it(new: New) -> None:
    store = new()
    for key in (A, B, C, D):
        write(store, key)
    assert store.pin([A, B], 0.05) == 2
    assert store.pin([A, B], 60) == 2
    assert store.pin([A], 0) == 1
    time.sleep(0.06)
    assert write(store, E) == 1
    assert present(store, A, B, C, D, E) == [False, True, True, True, True]
    write(store, A)
    assert present(store, B, C) == [True, False], "the pin of B was renewed"


def test_a_pin_goes_with_its_object(new: New) -> None:
    store = new()
    write(store, A)
    store.pin([A], 60)
    store.delete([A])
    for key in (A, B, C, D):
        write(store, key)
    write(store, E)
    assert present(store, A, B) == [False, True]


def test_a_pinned_object_expires_all_the_same(new: New) -> None:
    store = new(ttl_s=TTL_S)
    write(store, A)
    assert store.pin([A], 60) == 1
    wait_until(lambda: store.leading([A]) == 0)
    assert store.usage() == {}


def test_usage_is_by_namespace(new: New) -> None:
    store = new()
    write(store, A, B)
    write(store, elsewhere(A), nbytes=7)
    assert store.usage() == {HERE: 20, ELSEWHERE: 7}
    store.delete([A, B])
    assert store.usage() == {ELSEWHERE: 7}
    write(store, A, B, C, D, E)
    assert store.usage() == {HERE: 40}


def test_a_namespace_at_its_cap_evicts_of_its_own(new: New) -> None:
    store = new(namespace_quota_nbytes=20)
    write(store, elsewhere(A))
    write(store, A)
    write(store, B)
    assert write(store, C) == 1
    assert present(store, elsewhere(A), A, B, C) == [True, False, True, True]
    assert store.usage() == {HERE: 20, ELSEWHERE: 10}


def test_the_cap_is_of_all_slabs_together(new: New) -> None:
    store = new(namespace_quota_nbytes=20)
    store.register("r1.4096", N_SLOTS, [])
    (slot,) = store.reserve("r1.4096", [Wanted(A, 10)])
    assert slot is not None
    store.publish([Written(A, 10, slot)])
    write(store, B)
    write(store, C)
    assert present(store, A, B, C) == [False, True, True]


def test_under_a_cap_pinned_objects_go_last(new: New) -> None:
    store = new(namespace_quota_nbytes=20)
    write(store, A)
    write(store, B)
    store.pin([A], 60)
    write(store, C)
    assert present(store, A, B, C) == [True, False, True]
    store.pin([C], 60)
    write(store, D)
    assert present(store, A, C, D) == [False, True, True]


def test_a_batch_over_the_cap_stores_its_leading_part(new: New) -> None:
    store = new(namespace_quota_nbytes=25)
    write(store, D)
    assert write(store, A, B, C) == 2
    assert present(store, A, B, C, D) == [True, True, False, False]


def test_an_object_over_the_cap_is_refused_and_evicts_nothing(new: New) -> None:
    store = new(namespace_quota_nbytes=25)
    write(store, A)
    assert write(store, B, nbytes=26) == 0
    assert present(store, A) == [True]


def test_writers_at_once_do_not_exceed_the_cap_together(new: New) -> None:
    store = new(namespace_quota_nbytes=20)
    (first, second) = store.reserve(SLAB, [Wanted(A, 10), Wanted(B, 10)])
    (third, fourth) = store.reserve(SLAB, [Wanted(C, 10), Wanted(D, 10)])
    slots = [slot for slot in (first, second, third, fourth) if isinstance(slot, Slot)]
    assert store.publish([Written(A, 10, slots[0]), Written(B, 10, slots[1])]) == [True, True]
    assert store.publish([Written(C, 10, slots[2]), Written(D, 10, slots[3])]) == [True, True]
    assert store.usage() == {HERE: 20}
    assert present(store, A, B, C, D) == [False, False, True, True]
    assert store.totals(SLAB).held == 0


def test_one_publication_over_the_cap_keeps_its_leading_part(new: New) -> None:
    generous = new()
    slots = generous.reserve(SLAB, [Wanted(key, 10) for key in (A, B, C)])
    store = new(namespace_quota_nbytes=20)
    written = [Written(k, 10, s) for k, s in zip((A, B, C), slots, strict=True) if s is not None]
    assert store.publish(written) == [True, True, False]
    assert store.totals(SLAB) == (N_SLOTS, 2, 0)


def test_a_cap_that_was_lowered_holds_from_the_next_write_on(new: New) -> None:
    write(new(), A, B, C)
    store = new(namespace_quota_nbytes=20)
    write(store, D)
    assert store.usage() == {HERE: 20}
    assert present(store, A, D) == [True, True]


def test_an_object_of_no_length_comes_and_goes_as_others(new: New) -> None:
    store = new(namespace_quota_nbytes=20)
    write(store, A, nbytes=0)
    assert present(store, A) == [True]
    assert store.delete([A]) == 1
    assert sum(store.usage().values()) == 0


def test_another_length_counts_anew(new: New) -> None:
    store = new(namespace_quota_nbytes=30)
    write(store, A)
    write(store, B)
    assert write(store, A, nbytes=20) == 1
    assert store.usage() == {HERE: 20} or store.usage() == {HERE: 30}
    assert present(store, A) == [True]


def test_a_lease_does_not_keep_an_object_from_the_cap_but_its_slot_from_reuse(
    tmp_path: Path,
) -> None:
    store = SqliteMetadata(
        tmp_path / "index.sqlite", Limits(5.0, 60.0, 60.0, namespace_quota_nbytes=20)
    )
    store.open()
    store.register(SLAB, N_SLOTS, [])
    write(store, A, B)
    bindings = [binding for binding in store.lookup([A, B]) if binding is not None]
    write(store, C)
    assert present(store, A, B, C) in ([False, True, True], [True, False, True])
    assert not all(store.unchanged([A, B], bindings)), "whoever reads it is told"
    assert store.totals(SLAB) == (N_SLOTS, 2, 1)
    store.close()


def test_an_object_of_a_time_without_an_age_limit_expires_too(new: New) -> None:
    before = new()
    before.register("r1.4096", N_SLOTS, [Found(0, new_generation(time.time() - 61), A, 10)])
    assert present(before, A) == [True]
    store = new(ttl_s=60.0)
    assert present(store, A) == [False]
    assert store.lookup([A]) == [None]
    assert store.usage() == {}, "it has been asked for"


def test_a_quota_that_comes_later_counts_what_was_there(new: New) -> None:
    write(new(), A, B)
    store = new(namespace_quota_nbytes=20)
    store.check_integrity()
    write(store, C)
    assert store.usage() == {HERE: 20}
    write(new(), D)
    store.check_integrity()
    assert store.usage() == {HERE: 30}, "whoever has no quota keeps to none"


def test_pins_end_with_a_reboot(tmp_path: Path) -> None:
    def opened() -> SqliteMetadata:
        store = SqliteMetadata(tmp_path / "index.sqlite", Limits(5.0, 0.01, 5.0))
        store.open()
        return store

    store = opened()
    store.register(SLAB, N_SLOTS, [])
    for key in (A, B, C, D):
        write(store, key)
    store.pin([A], 3600)
    store.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute("UPDATE boots SET boot_id = 'another'")
    db.close()
    store = opened()
    write(store, E)
    assert present(store, A, B) == [False, True]
    store.check_integrity()
    store.close()
