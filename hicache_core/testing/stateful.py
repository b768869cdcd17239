"""A state machine of Hypothesis: a backend against the memory backend. Needs hypothesis."""

from __future__ import annotations

from itertools import compress
from typing import cast

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.testing.content import content, page_difference
from hicache_core.testing.features import Feature, detect
from hicache_core.testing.harness import Harness, expect, is_hit
from hicache_core.types import BackendContext

_N_KEYS = 4
_SHAPES = ((64, 100), (0,), (1, 2, 3), (64, 4096))
_WHICH = st.integers(0, _N_KEYS - 1)
_BATCH = st.lists(_WHICH, max_size=2 * _N_KEYS)


def check(h: Harness) -> None:
    """Runs the machine on the backend of ``h``.

    Raises:
        RuleBroken: the backend and the memory backend give different answers; the message has the
            calls that led to it.
    """
    deletes = Feature.DELETE in detect(h.backend, h.target)
    n_runs = 0

    def machine() -> BackendMachine:
        nonlocal n_runs
        n_runs += 1
        return BackendMachine(h, n_runs, deletes=deletes)

    run_state_machine_as_test(
        cast(type[BackendMachine], machine),  # it is called and no more: any factory will do
        settings=settings(
            max_examples=h.settings.examples,
            stateful_step_count=h.settings.steps,
            deadline=None,
            database=None,
            derandomize=True,
            print_blob=False,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        ),
    )


class BackendMachine(RuleBasedStateMachine):
    """Calls on a few keys; each key has its own shape, so that any of them may be read.

    Two keys each are of the same page in two namespaces, as those of a page and of a unit of a
    group of layers are, which one call asks for and reads together.
    """

    def __init__(self, h: Harness, run: int, *, deletes: bool) -> None:
        """Starts with keys that are not there.

        Args:
            h: gives the backend.
            run: number of the run, so that each has keys of its own.
            deletes: whether the backend can delete.
        """
        super().__init__()
        self.harness = h
        self.backend = h.backend
        self.deletes = deletes
        self.keys: list[str] = []
        for key in h.keys(_N_KEYS // 2, f"run {run}"):
            page_hash = key.partition("/")[2]
            self.keys += [key, *h.remember([f"{h.namespace[::-1]}/{page_hash}"])]
        self.model = MemoryBackend(MemoryConfig(), BackendContext(h.namespace))
        self.model.open()

    def nbytes(self, which: int) -> int:
        """The length of the object of key ``which``."""
        return sum(_SHAPES[which])

    @rule(which=_WHICH)
    def set(self, which: int) -> None:
        """Stores one object."""
        value = content(self.keys[which], self.nbytes(which))
        self.backend.set(self.keys[which], value)
        self.model.set(self.keys[which], value)

    @rule(which=_WHICH)
    def get(self, which: int) -> None:
        """Reads one object."""
        found = is_hit(self.backend, self.keys[which], self.nbytes(which))
        self._compare("get", found, self.model.exists(self.keys[which]))

    @rule(which=_WHICH)
    def exists(self, which: int) -> None:
        """Asks for one key."""
        key = self.keys[which]
        self._compare("exists", bool(self.backend.exists(key)), self.model.exists(key))

    @rule(batch=_BATCH, each=st.booleans())
    def batch_set(self, batch: list[int], each: bool) -> None:
        """Stores several pages, by either of the two calls."""
        keys = [self.keys[which] for which in batch]
        for backend in (self.backend, self.model):
            pages = [
                self.harness.filled(key, _SHAPES[w]) for key, w in zip(keys, batch, strict=True)
            ]
            if each:
                self._compare("set_each", list(backend.set_each(keys, pages)), [True] * len(keys))
            else:
                self._compare("batch_set", backend.batch_set(keys, pages), len(keys))

    @rule(batch=_BATCH)
    def batch_exists(self, batch: list[int]) -> None:
        """Asks for several keys, by both calls."""
        keys = [self.keys[which] for which in batch]
        expected = self.model.batch_exists(keys)
        self._compare("batch_exists", self.backend.batch_exists(keys), expected)
        present = [self.model.exists(key) for key in keys]
        self._compare("exists_each", list(self.backend.exists_each(keys)), present)

    @rule(batch=_BATCH)
    def batch_get(self, batch: list[int]) -> None:
        """Reads several pages, by both calls."""
        keys = [self.keys[which] for which in batch]
        pages = [self.harness.blank(_SHAPES[which]) for which in batch]
        n_filled = self.backend.batch_get(keys, pages)
        self._compare("batch_get", n_filled, self.model.batch_exists(keys))
        for key, page in zip(keys[:n_filled], pages, strict=False):
            wrong = page_difference(key, page)
            expect(not wrong, f"batch_get says it filled the page of {key}: {wrong}")
        pages = [self.harness.blank(_SHAPES[which]) for which in batch]
        filled = list(self.backend.get_each(keys, pages))
        self._compare("get_each", filled, [self.model.exists(key) for key in keys])
        for key, page in compress(zip(keys, pages, strict=True), filled):
            wrong = page_difference(key, page)
            expect(not wrong, f"get_each says it filled the page of {key}: {wrong}")

    @precondition(lambda self: self.deletes)
    @rule(batch=_BATCH)
    def delete(self, batch: list[int]) -> None:
        """Removes several keys."""
        keys = [self.keys[which] for which in batch]
        self.backend.delete(keys)
        self.model.delete(keys)

    def teardown(self) -> None:
        """Leaves nothing in the store."""
        if self.deletes:
            self.backend.delete(self.keys)
        self.model.close()

    @staticmethod
    def _compare(call: str, found: object, expected: object) -> None:
        expect(found == expected, f"{call} answers {found}; the memory backend answers {expected}")
