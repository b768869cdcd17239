"""A chain against a dict, with links that fail, forget and fill up at random."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hicache_core.errors import BackendError, BackendTimeout, BackendUnavailable, BreakerOpen
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.chain.capabilities import Link
from hicache_core.storage.chain.config import ChainConfig
from tests.unit.storage.virtual import (
    CONTEXT,
    NBYTES,
    Clock,
    Told,
    blank,
    content,
    filled,
    key,
    make_worker,
)

T = TypeVar("T")

KEYS = [key(n) for n in range(6)]
NAMES = ("near", "middle", "far")

ranges = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(lambda r: KEYS[r[0] : r[0] + r[1]])
names = st.lists(st.sampled_from(KEYS), max_size=6)
link_numbers = st.integers(0, 2)
errors = st.sampled_from([BackendUnavailable, BackendTimeout, BreakerOpen])


class ChainMachine(RuleBasedStateMachine):
    """Bytes are never wrong; what was acknowledged is found while a link that got it lives."""

    @initialize(write=st.sampled_from(["through", "behind"]), promote=st.booleans())
    def start(self, write: str, promote: bool) -> None:
        self.stores = [Told(Clock()) for _ in NAMES]
        self.kept: dict[str, set[int]] = {}  # who must have a key that was acknowledged
        self.promised: dict[str, set[int]] = {}  # who must have it after a flush that says so
        self.write = write
        config = ChainConfig.model_validate(
            {
                "links": [{"backend": name} for name in NAMES],
                "write": write,
                "promote": promote,
                "max_behind_nbytes": 8 * NBYTES,
                "max_promote_nbytes": 3 * NBYTES,
                "settle_s": 20.0,
            }
        )
        links = [Link(name, store) for name, store in zip(NAMES, self.stores, strict=True)]
        self.chain = ChainBackend(config, CONTEXT, links, make_worker)
        self.chain.open()

    def alive(self) -> list[int]:
        return [n for n, store in enumerate(self.stores) if store.always is None]

    def calm(self) -> list[int]:
        """Links that answered all along: nothing fails next, and nothing did."""
        return [n for n in self.alive() if not self.stores[n].errors]

    def guarded(self, call: Callable[[], T]) -> T | None:
        """What the chain answered; None if it raised, which it may only if no link was calm."""
        calm = self.calm()
        try:
            return call()
        except BackendError:
            assert not calm
            return None

    @rule(keys=ranges)
    def store(self, keys: list[str]) -> None:
        calm = self.calm()
        pages = filled(keys)
        n = self.guarded(lambda: self.chain.batch_set(keys, pages))
        for page in pages:
            page[0][:] = b"reused!!"  # the memory is the caller's again
        self.acknowledged(keys[: n or 0], calm)

    @rule(names=names)
    def store_each(self, names: list[str]) -> None:
        calm = self.calm()
        pages = filled(names)
        mask = self.guarded(lambda: self.chain.set_each(names, pages))
        for page in pages:
            page[0][:] = b"reused!!"
        self.acknowledged(list(compress(names, mask or ())), calm)

    def acknowledged(self, keys: list[str], calm: list[int]) -> None:
        for name in keys:
            holders = {i for i, one in enumerate(self.stores) if name in one.objects}
            assert holders, "acknowledged, but nobody has it"
            if self.write == "through":
                assert holders >= set(calm), "a link that answered has not what was acknowledged"
            self.kept[name] = holders
            if 0 in calm:
                self.promised[name] = {1, 2} if self.write == "behind" else set(calm)

    @rule(keys=ranges)
    def read(self, keys: list[str]) -> None:
        pages = blank(len(keys))
        n = self.guarded(lambda: self.chain.batch_get(keys, pages))
        if n is not None:
            assert pages[:n] == filled(keys[:n])

    @rule(keys=ranges)
    def ask(self, keys: list[str]) -> None:
        n = self.guarded(lambda: self.chain.batch_exists(keys))
        if n is not None:
            held = [any(name in store.objects for store in self.stores) for name in keys]
            assert all(held[:n])

    @rule(names=names)
    def read_each(self, names: list[str]) -> None:
        self.chain.settle()  # a copy that arrives late is no key that was passed over
        pages, calm = blank(len(names)), self.calm()
        mask = self.guarded(lambda: self.chain.get_each(names, pages))
        for name, page, is_filled in zip(names, pages, mask or [False] * len(names), strict=True):
            if is_filled:
                assert [page] == filled([name])
            elif mask is not None:
                assert not any(name in self.stores[n].objects for n in calm), "not read"

    @rule(names=names)
    def ask_each(self, names: list[str]) -> None:
        self.chain.settle()
        mask = self.guarded(lambda: self.chain.exists_each(names))
        for name, is_present in zip(names, mask or (), strict=mask is not None):
            held = {n for n, store in enumerate(self.stores) if name in store.objects}
            assert held if is_present else not held & set(self.calm())

    @rule(number=link_numbers, error=errors)
    def die(self, number: int, error: type[BackendError]) -> None:
        self.stores[number].always = error("gone")

    @rule(number=link_numbers)
    def come_back(self, number: int) -> None:
        self.stores[number].always = None

    @rule(number=link_numbers, error=errors)
    def fail_once(self, number: int, error: type[BackendError]) -> None:
        self.stores[number].errors.append(error("once"))

    @rule(number=link_numbers, room=st.sampled_from([None, 0, 2]))
    def set_room(self, number: int, room: int | None) -> None:
        self.stores[number].room = room

    @rule(number=link_numbers, name=st.sampled_from(KEYS))
    def forget(self, number: int, name: str) -> None:
        self.stores[number].objects.pop(name, None)
        self.kept.get(name, set()).discard(number)
        self.promised.get(name, set()).discard(number)

    @rule(name=st.sampled_from(KEYS))
    def delete(self, name: str) -> None:
        self.promised.pop(name, None)
        try:
            self.chain.delete([name])
        except BackendError:  # those that could have done it
            still = {n for n, store in enumerate(self.stores) if name in store.objects}
            self.kept.get(name, set()).intersection_update(still)
            return
        assert not any(name in store.objects for store in self.stores)
        self.kept.pop(name, None)

    @rule()
    def flush(self) -> None:
        if self.chain.flush(20):
            for name, numbers in self.promised.items():
                assert all(name in self.stores[n].objects for n in numbers), "flushed, not there"
        self.promised.clear()

    @invariant()
    def what_was_acknowledged_is_found(self) -> None:
        for name, holders in getattr(self, "kept", {}).items():
            if holders & set(self.calm()):
                page = blank(1)
                assert self.chain.batch_get([name], page) == 1
                assert page == filled([name])

    @invariant()
    def no_store_has_wrong_bytes(self) -> None:
        for store in getattr(self, "stores", []):
            assert all(value == content(name) for name, value in list(store.objects.items()))

    def teardown(self) -> None:
        if hasattr(self, "chain"):
            self.chain.settle()
            assert all(
                count == 0
                for figure, count in self.chain.copy_counts().items()
                if figure.endswith("in_flight")
            )
            self.chain.close()


TestChainMachine = ChainMachine.TestCase
TestChainMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
