"""A state machine: leases and reservations of the SQLite store against a plain model of slots."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hicache_hf3fs.metadata import Limits, Slot, Wanted, Written
from hicache_hf3fs.metadata_sqlite import SqliteMetadata
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from plugins.hf3fs.tests.helpers import key_of

SLAB, N_SLOTS = "r0.4096", 5
LIMITS = Limits(timeout_s=5.0, lease_s=10.0, write_lease_s=60.0)
KEYS = st.lists(st.sampled_from([key_of(n) for n in range(9)]), min_size=1, max_size=4, unique=True)


class Slots(RuleBasedStateMachine):
    """A slot that is leased or reserved is nobody else's, whatever the order of the calls."""

    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name, "index.sqlite")
        self.store = SqliteMetadata(path, limits=LIMITS, clock=lambda: self.now)
        self.store.open()
        self.store.register(SLAB, N_SLOTS, [])
        self.leased: dict[int, float] = {}  # slot number -> end of the lease that was promised
        self.reserved: dict[int, tuple[Slot, float]] = {}  # slot number -> for whom, until when

    @rule(target=reservations, keys=KEYS)
    def reserve(self, keys: list[str]) -> object:
        slots = self.store.reserve(SLAB, [Wanted(key, 10) for key in keys])
        taken = [(k, s) for k, s in zip(keys, slots, strict=False) if s is not None]
        for _, slot in taken:
            assert self.leased.get(slot.number, 0) <= self.now, "a leased slot was given away"
            _, end = self.reserved.get(slot.number, (None, 0))
            assert end <= self.now, "a reserved slot was given away"
            self.reserved[slot.number] = slot, self.now + LIMITS.write_lease_s
        return multiple(*taken)

    @rule(reservation=reservations)
    def publish(self, reservation: tuple[str, Slot]) -> None:
        key, slot = reservation
        holder, _ = self.reserved.get(slot.number, (None, 0))
        published = self.store.publish([Written(key, 10, slot)])
        assert published == [holder == slot], "published without a reservation, or refused with one"
        if holder == slot:
            assert self.store.leading([key]) == 1
            del self.reserved[slot.number]

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
        for binding in self.store.lookup(keys):
            if binding is not None:
                self.leased[binding.slot.number] = self.now + LIMITS.lease_s

    @rule(keys=KEYS)
    def delete(self, keys: list[str]) -> None:
        self.store.delete(keys)
        assert self.store.leading(keys) == 0

    @rule(seconds=st.sampled_from([1.0, 9.0, 21.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def every_slot_is_in_one_state(self) -> None:
        self.store.check_integrity()
        totals = self.store.totals(SLAB)
        assert totals.bound + totals.held <= N_SLOTS

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
