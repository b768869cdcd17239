"""A state machine: the SQLite store against a plain model of slots, ages, pins and bytes.

Half of the runs have an age limit and a cap on the bytes of a namespace. Now and then the process
ends without a word: the next one finds what was committed, and it adds up.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hicache_hf3fs.metadata import Limits, Slot, Wanted, Written
from hicache_hf3fs.metadata_sqlite import SqliteMetadata
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from hicache_core.storage.base import namespace_of
from plugins.hf3fs.tests.helpers import key_of

SLAB, N_SLOTS, NBYTES, CAP_NBYTES, TTL_S = "r0.4096", 5, 10, 30, 100.0
LIMITS = Limits(timeout_s=5.0, lease_s=10.0, write_lease_s=60.0)
NAMES = [key_of(n) if n % 3 else f"fedcba9876543210/{n}" for n in range(9)]
KEYS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)


class Slots(RuleBasedStateMachine):
    """A slot that is leased or reserved is nobody else's, whatever the order of the calls."""

    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.directory = tempfile.TemporaryDirectory()
        self.leased: dict[int, float] = {}  # slot number -> end of the lease that was promised
        self.reserved: dict[int, tuple[Slot, float]] = {}  # slot number -> for whom, until when
        self.begun: dict[str, float] = {}  # key -> when it was last reserved
        self.in_use: dict[str, float] = {}  # key -> until when nothing of it may be evicted
        self.pinned: dict[str, float] = {}  # key -> end of its pin, of keys that are there

    @initialize(bounded=st.booleans())
    def begin(self, bounded: bool) -> None:
        self.bounded = bounded
        self.start()
        self.store.register(SLAB, N_SLOTS, [])

    def start(self) -> None:
        path = Path(self.directory.name, "index.sqlite")
        limits = LIMITS
        if self.bounded:
            limits = LIMITS._replace(ttl_s=TTL_S, namespace_quota_nbytes=CAP_NBYTES)
        self.store = SqliteMetadata(path, limits, lambda: self.now, lambda: self.now)
        self.store.open()

    @rule()
    def end_without_a_word(self) -> None:
        self.store.close()
        self.start()

    @rule(target=reservations, keys=KEYS)
    def reserve(self, keys: list[str]) -> object:
        before = self.there()
        slots = self.store.reserve(SLAB, [Wanted(key, NBYTES) for key in keys])
        taken = [(k, s) for k, s in zip(keys, slots, strict=False) if s is not None]
        for key, slot in taken:
            assert self.leased.get(slot.number, 0) <= self.now, "a leased slot was given away"
            _, end = self.reserved.get(slot.number, (None, 0))
            assert end <= self.now, "a reserved slot was given away"
            self.reserved[slot.number] = slot, self.now + LIMITS.write_lease_s
            self.begun[key] = self.now
        for key in keys:
            self.in_use[key] = max(self.in_use.get(key, 0), self.now)
        self.check_who_went(before)
        return multiple(*taken)

    @rule(reservation=reservations)
    def publish(self, reservation: tuple[str, Slot]) -> None:
        key, slot = reservation
        holder, _ = self.reserved.get(slot.number, (None, 0))
        before = self.there()
        (published,) = self.store.publish([Written(key, NBYTES, slot)])
        if holder != slot:
            assert not published, "published without a reservation"
            return
        del self.reserved[slot.number]
        if not published:
            assert self.bounded, "refused with a reservation"
            used = self.store.usage().get(namespace_of(key), 0)
            assert used + NBYTES > CAP_NBYTES, "refused with a reservation and under the cap"
        elif self.is_young(key):
            assert self.store.leading([key]) == 1
        if key not in before:
            self.pinned.pop(key, None)
        self.in_use[key] = max(self.in_use.get(key, 0), self.now)
        self.check_who_went(before)

    @rule(reservation=reservations)
    def release(self, reservation: tuple[str, Slot]) -> None:
        slot = reservation[1]
        bound = self.store.totals(SLAB).bound
        self.store.release([slot])
        assert self.store.totals(SLAB).bound == bound, "what is published cannot be released"
        if self.reserved.get(slot.number, (None, 0))[0] == slot:
            del self.reserved[slot.number]

    @rule(keys=KEYS)
    def lookup(self, keys: list[str]) -> None:
        for key, binding in zip(keys, self.store.lookup(keys), strict=True):
            if binding is not None:
                self.leased[binding.slot.number] = self.now + LIMITS.lease_s
                # It is given for twice the time that is promised.
                self.in_use[key] = self.now + 2 * LIMITS.lease_s

    @rule(keys=KEYS)
    def delete(self, keys: list[str]) -> None:
        there = self.there()
        assert self.store.delete(keys) >= len(there.intersection(keys))
        assert self.store.leading(keys) == 0
        for key in keys:
            self.pinned.pop(key, None)

    @rule(keys=KEYS, ttl_s=st.sampled_from([0.0, 5.0, 50.0]))
    def pin(self, keys: list[str], ttl_s: float) -> None:
        there = self.there().intersection(keys)
        assert self.store.pin(keys, ttl_s) == len(there)
        self.pinned.update(dict.fromkeys(there, self.now + ttl_s))

    @rule(seconds=st.sampled_from([1.0, 9.0, 21.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def there(self) -> set[str]:
        return {key for key in NAMES if self.store.leading([key])}

    def is_young(self, key: str) -> bool:
        return not self.bounded or self.now - self.begun[key] < TTL_S

    def check_who_went(self, before: set[str]) -> None:
        """If a pinned object went, no other of its namespace stays that could have gone instead."""
        there = self.there()
        for gone in before - there:
            if self.pinned.pop(gone, 0) > self.now:
                space = namespace_of(gone)
                stay = {key for key in there & before if namespace_of(key) == space}
                for key in stay:
                    is_kept = self.in_use.get(key, 0) >= self.now
                    assert is_kept or self.pinned.get(key, 0) > self.now, f"{key} could have gone"

    @invariant()
    def every_slot_is_in_one_state(self) -> None:
        self.store.check_integrity()
        totals = self.store.totals(SLAB)
        assert totals.bound + totals.held <= N_SLOTS

    @invariant()
    def bytes_and_ages_are_within_their_limits(self) -> None:
        there, usage = self.there(), self.store.usage()
        assert there == set(self.store.keys(""))
        assert sum(usage.values()) == NBYTES * len(there)
        if self.bounded:
            assert all(nbytes <= CAP_NBYTES for nbytes in usage.values())
            assert all(self.is_young(key) for key in there), "an expired object is found"

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()


TestSlots = Slots.TestCase
TestSlots.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
