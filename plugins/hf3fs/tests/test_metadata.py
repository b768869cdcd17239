"""Rules of a metadata store, on each of the two."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hicache_hf3fs.metadata import (
    Binding,
    Found,
    Limits,
    MetadataStore,
    SlabUnknown,
    Slot,
    Wanted,
    Written,
)
from hicache_hf3fs.metadata_redis import RedisMetadata
from hicache_hf3fs.metadata_sqlite import SqliteMetadata

from plugins.hf3fs.tests.helpers import key_of
from tests.servers.valkey import Valkey

SLAB = "r0.4096"
LEASE_S = 0.15
LIMITS = Limits(timeout_s=5.0, lease_s=LEASE_S, write_lease_s=0.3)
A, B, C, D, E = (key_of(label) for label in "ABCDE")


@pytest.fixture(params=["sqlite", "redis"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, valkey: Valkey
) -> Iterator[MetadataStore]:
    """A store that knows a slab of three slots."""
    made: MetadataStore
    if request.param == "sqlite":
        made = SqliteMetadata(tmp_path / "index.sqlite", limits=LIMITS)
    else:
        made = RedisMetadata(valkey.url, tmp_path.name, LIMITS)
    made.open()
    made.register(SLAB, 3, [])
    yield made
    made.check_integrity()
    made.close()


def write(store: MetadataStore, *keys: str, nbytes: int = 10) -> list[bool]:
    """Reserves and publishes; which of the keys are stored."""
    slots = store.reserve(SLAB, [Wanted(key, nbytes) for key in keys])
    written = [
        Written(key, nbytes, slot)
        for key, slot in zip(keys, slots, strict=False)
        if slot is not None
    ]
    store.check_integrity()
    published = iter(store.publish(written))
    store.check_integrity()
    stored = [slot is None or next(published) for slot in slots]
    return stored + [False] * (len(keys) - len(stored))


def slot_of(store: MetadataStore, key: str) -> int | None:
    """Where a key is bound; leases it."""
    (binding,) = store.lookup([key])
    return None if binding is None else binding.slot.number


def test_a_published_key_is_found_with_its_slot_and_length(store: MetadataStore) -> None:
    (slot,) = store.reserve(SLAB, [Wanted(A, 10)])
    assert slot is not None
    assert store.lookup([A]) == [None]
    assert store.publish([Written(A, 10, slot)]) == [True]
    assert store.lookup([A, B]) == [Binding(slot, 10), None]


def test_leading_counts_up_to_the_first_hole(store: MetadataStore) -> None:
    write(store, A, B)
    assert [store.leading(keys) for keys in ([A, B, C], [C, A], [], [B, A, B])] == [2, 0, 0, 3]


def test_presence_is_told_for_each_key(store: MetadataStore) -> None:
    write(store, A, C)
    assert store.present([A, B, C, B, A]) == [True, False, True, False, True]
    assert store.present([]) == []
    many = [key_of(n) for n in range(1200)]
    assert store.present([*many, C]) == [False] * 1200 + [True]


def test_what_is_stored_already_gets_no_slot(store: MetadataStore) -> None:
    write(store, A)
    first, second = store.reserve(SLAB, [Wanted(A, 10), Wanted(B, 10)])
    assert first is None
    assert second is not None


def test_another_length_takes_the_key_over(store: MetadataStore) -> None:
    write(store, A, nbytes=10)
    assert write(store, A, nbytes=20) == [True]
    (binding,) = store.lookup([A])
    assert binding is not None
    assert binding.nbytes == 20
    assert store.totals(SLAB).bound == 1


def test_a_batch_larger_than_the_slab_stores_its_leading_part(store: MetadataStore) -> None:
    assert write(store, A, B, C, D, E) == [True, True, True, False, False]


def test_the_least_recently_used_goes_first(store: MetadataStore) -> None:
    write(store, A)
    write(store, B)
    write(store, C)
    store.lookup([A])
    assert write(store, D) == [True]
    assert [slot_of(store, key) is not None for key in (A, B, C, D)] == [True, False, True, True]


def test_of_one_batch_the_last_goes_first(store: MetadataStore) -> None:
    write(store, A, B, C)
    write(store, D)
    assert store.leading([A, B]) == 2
    assert store.leading([C]) == 0


def test_a_batch_does_not_evict_what_it_found_stored(store: MetadataStore) -> None:
    write(store, A)
    write(store, B, C)
    assert write(store, D, E, A) == [True, True, True]
    assert store.leading([D, E, A]) == 3


def test_a_leased_slot_is_not_evicted_until_its_lease_ends(store: MetadataStore) -> None:
    write(store, A, B, C)
    store.lookup([A, B, C])
    assert write(store, D) == [False]
    time.sleep(2 * LEASE_S)
    assert write(store, D) == [True]


def test_a_lease_lasts_as_long_as_promised_when_it_was_given_before(store: MetadataStore) -> None:
    write(store, A, B, C)
    store.lookup([A, B, C])
    time.sleep(1.2 * LEASE_S)  # less than lease_s is left of the first lease
    store.lookup([A, B, C])
    time.sleep(0.9 * LEASE_S)
    assert write(store, D) == [False]


def test_a_deleted_slot_is_in_quarantine_until_its_lease_ends(store: MetadataStore) -> None:
    write(store, A, B, C)
    store.lookup([A])
    assert store.delete([A, E]) == 1
    assert store.totals(SLAB) == (3, 2, 1)
    store.lookup([B, C])
    assert write(store, D) == [False]
    time.sleep(2 * LEASE_S)
    assert store.totals(SLAB) == (3, 2, 0)
    assert write(store, D) == [True]


def test_a_deleted_slot_that_nobody_read_is_free_at_once(store: MetadataStore) -> None:
    write(store, A, B, C)
    store.delete([A])
    store.lookup([B, C])
    assert write(store, D) == [True]


def test_delete_with_a_generation_spares_what_came_after(store: MetadataStore) -> None:
    write(store, A)
    (binding,) = store.lookup([A])
    assert binding is not None
    assert store.delete([A], [binding.slot.generation + 1]) == 0
    assert store.delete([A], [binding.slot.generation]) == 1
    assert store.lookup([A]) == [None]


def test_a_reserved_slot_is_free_again_when_its_time_is_over(store: MetadataStore) -> None:
    slots = store.reserve(SLAB, [Wanted(key, 10) for key in (A, B, C)])
    assert write(store, D) == [False]
    assert store.totals(SLAB) == (3, 0, 3)
    time.sleep(LIMITS.write_lease_s)
    assert write(store, D, E, C) == [True, True, True]
    late = [Written(A, 10, slot) for slot in slots if slot is not None]
    assert store.publish(late) == [False, False, False]
    assert store.lookup([A]) == [None]


def test_a_released_slot_is_free_at_once_and_cannot_be_published(store: MetadataStore) -> None:
    slots = [slot for slot in store.reserve(SLAB, [Wanted(A, 10)]) if slot is not None]
    store.release(slots)
    assert store.totals(SLAB).held == 0
    assert store.publish([Written(A, 10, slots[0])]) == [False]


def test_of_two_writers_of_one_key_the_first_binds_and_no_slot_is_lost(
    store: MetadataStore,
) -> None:
    (first,) = store.reserve(SLAB, [Wanted(A, 10)])
    (second,) = store.reserve(SLAB, [Wanted(A, 10)])
    assert first is not None
    assert second is not None
    assert store.publish([Written(A, 10, second)]) == [True]
    assert store.publish([Written(A, 10, first)]) == [True]
    assert store.publish([Written(A, 10, first)]) == [False], "a reservation is published once"
    assert store.lookup([A]) == [Binding(second, 10)]
    assert write(store, B, C) == [True, True]


def test_a_binding_that_moved_is_told_for_each_key(store: MetadataStore) -> None:
    write(store, A, B, C)
    keys = [A, B, C]
    bindings = [binding for binding in store.lookup(keys) if binding is not None]
    assert store.unchanged(keys, bindings) == [True, True, True]
    store.delete([B])
    assert store.unchanged(keys, bindings) == [True, False, True]
    write(store, B)
    assert store.unchanged(keys, bindings) == [True, False, True]
    assert store.unchanged([], []) == []


def test_keys_are_listed_by_prefix(store: MetadataStore) -> None:
    write(store, A, B)
    assert sorted(store.keys(A[:17])) == sorted([A, B])
    assert list(store.keys(A)) == [A]
    assert list(store.keys("fedcba9876543210/")) == []


def test_reserving_in_an_unknown_slab_is_told(store: MetadataStore) -> None:
    with pytest.raises(SlabUnknown):
        store.reserve("r7.4096", [Wanted(A, 10)])
    assert store.n_slots("r7.4096") is None


def test_a_slab_is_attached_with_what_is_found_in_it(store: MetadataStore) -> None:
    found = [Found(3, 11, B, 20), Found(1, 12, A, 10), Found(4, 13, A, 10)]
    assert store.attach("r1.4096", 6, lambda: found)
    assert not store.attach("r1.4096", 6, lambda: found)
    store.check_integrity()
    assert store.lookup([B]) == [Binding(Slot("r1.4096", 3, 11), 20)]
    (kept,) = store.lookup([A])
    assert kept is not None
    assert kept.slot in {(("r1.4096", 1, 12)), ("r1.4096", 4, 13)}
    assert store.totals("r1.4096") == (6, 2, 0)
    slots = store.reserve("r1.4096", [Wanted(key_of(n), 1) for n in range(6)])
    assert {slot.number for slot in slots if slot} == {0, 1, 2, 3, 4, 5} - {3, kept.slot.number}


def test_a_slab_that_grew_has_more_slots(store: MetadataStore) -> None:
    write(store, A, B, C)
    store.attach(SLAB, 5, list)
    assert store.n_slots(SLAB) == 5
    assert write(store, D, E) == [True, True]
    assert store.leading([A, B, C, D, E]) == 5
