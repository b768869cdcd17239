"""What a rule works with: opened backends, keys of its own, threads and a second process."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import TypeVar

from hicache_core.errors import BackendError
from hicache_core.storage.base import RegistersMemory, StorageBackend
from hicache_core.storage.segments import scatter
from hicache_core.testing.arena import Arena
from hicache_core.testing.bounded import Call
from hicache_core.testing.content import GuardedPage, content, difference, page_difference
from hicache_core.testing.control import StoreControl
from hicache_core.testing.features import Target
from hicache_core.testing.kit_settings import KitSettings
from hicache_core.testing.peer import Peer
from hicache_core.testing.recipe import Recipe
from hicache_core.types import Page

C = TypeVar("C")

_SWITCH_INTERVAL_S = 1e-5
"""Seconds between switches of racing threads: so short that a few steps of Python hide no race."""


class RuleBroken(AssertionError):
    """The backend does not do what a rule asks; the message says what was found."""


def expect(condition: object, found: str) -> None:
    """Raises ``RuleBroken`` with ``found`` unless ``condition`` holds."""
    if not condition:
        raise RuleBroken(found)


def required(backend: StorageBackend, kind: type[C]) -> C:
    """What does ``kind`` for ``backend``; only for rules that require that feature."""
    found = backend.capability(kind)
    assert found is not None
    return found


class Harness:
    """The environment of one rule. Use it as a context manager; it leaves nothing behind."""

    def __init__(self, target: Target, settings: KitSettings) -> None:
        """Opens nothing yet."""
        self.target = target
        self.settings = settings
        self.namespace = secrets.token_hex(8)
        self._opened: list[StorageBackend] = []
        self._keys: list[str] = []
        self._peers: list[Peer] = []
        self._first: StorageBackend | None = None
        self._arena: Arena | None = None

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def backend(self) -> StorageBackend:
        """The instance under test, opened by the first use."""
        if self._first is None:
            self._first = self.another()
        return self._first

    @property
    def control(self) -> StoreControl:
        """Control over the server; only for rules that require it."""
        assert self.target.control is not None
        return self.target.control

    def another(self, recipe: Recipe | None = None, *, register: bool = True) -> StorageBackend:
        """One more opened instance; closed with the harness.

        Args:
            recipe: makes it; that of the target if None.
            register: announce the memory of the kit's pages to it, if it asks for that.
        """
        backend = (recipe or self.target.recipe).make()
        backend.open()
        self._opened.append(backend)
        registers = backend.capability(RegistersMemory) if register else None
        if registers is not None:
            self._arena = self._arena or Arena(self.settings.arena_nbytes)
            registers.register_memory([self._arena.memory])
        return backend

    def forget(self, backend: StorageBackend) -> None:
        """Removes an instance that the rule has closed itself."""
        self._opened.remove(backend)
        if backend is self._first:
            self._first = None

    def peer(self) -> Peer:
        """A second process with an opened backend on the same store; ended with the harness."""
        peer = Peer(self.target.recipe, self.settings.rule_s)
        self._peers.append(peer)
        return peer

    def keys(self, n_keys: int, label: str = "") -> list[str]:
        """``n_keys`` page keys of this rule alone; the same ones for the same label."""
        texts = (f"{self.namespace} {label} {n}" for n in range(n_keys))
        digests = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
        return self.remember(f"{self.namespace}/{digest}" for digest in digests)

    def remember(self, keys: Iterable[str]) -> list[str]:
        """Returns ``keys``, and deletes them at the end if the backend can delete."""
        listed = list(keys)
        self._keys += listed
        return listed

    def nbytes(self, wanted: int) -> int:
        """``wanted`` bytes for an object, or what the backend's limit allows."""
        limit = self.target.recipe.max_object_nbytes
        return min(wanted, limit) if limit else wanted

    def race(self, runners: Sequence[Callable[[], None]], seconds: float) -> None:
        """Calls each runner repeatedly on a thread of its own; raises what one of them raised."""
        stop_at = time.monotonic() + seconds

        def repeat(runner: Callable[[], None]) -> None:
            runner()
            while time.monotonic() < stop_at:
                runner()

        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        try:
            calls = [Call(partial(repeat, runner)) for runner in runners]
            for call in calls:
                call.result(seconds + self.settings.rule_s, "a racing thread")
        finally:
            sys.setswitchinterval(before)

    def guarded(self, shape: Sequence[int]) -> GuardedPage:
        """An unfilled page, in registered memory where the backend asks for that."""
        return GuardedPage(shape, self._arena.take if self._arena else _anywhere)

    def blank(self, shape: Sequence[int]) -> Page:
        """A page with segments of these lengths (bytes) that holds no object yet."""
        return self.guarded(shape).segments

    def filled(self, key: str, shape: Sequence[int]) -> Page:
        """A page with segments of these lengths (bytes) that holds the object of ``key``."""
        page = self.blank(shape)
        scatter(content(key, sum(shape)), page)
        return page

    def put(self, backend: StorageBackend, keys: Sequence[str], shape: Sequence[int]) -> None:
        """Stores the objects of ``keys`` as one batch of pages.

        Args:
            backend: the backend under test.
            keys: a page is stored under each.
            shape: bytes of each segment of a page.
        """
        n_stored = backend.batch_set(keys, [self.filled(key, shape) for key in keys])
        expect(n_stored == len(keys), f"batch_set stored {n_stored} of {len(keys)} pages")

    def leading_hits(
        self, backend: StorageBackend, keys: Sequence[str], shape: Sequence[int]
    ) -> int:
        """How many leading pages ``batch_get`` fills; wrong bytes in them break the rule.

        Args:
            backend: the backend under test.
            keys: the pages to read.
            shape: bytes of each segment of a page.
        """
        pages = [self.blank(shape) for _ in keys]
        n_filled = backend.batch_get(keys, pages)
        expect(0 <= n_filled <= len(keys), f"batch_get of {len(keys)} pages answered {n_filled}")
        for key, page in zip(keys[:n_filled], pages, strict=False):
            wrong = page_difference(key, page)
            expect(not wrong, f"batch_get says it filled the page of {key}: {wrong}")
        return n_filled

    def each_hits(
        self, backend: StorageBackend, keys: Sequence[str], shape: Sequence[int]
    ) -> list[bool]:
        """For each page, whether ``get_each`` fills it; wrong bytes in it break the rule.

        Args:
            backend: the backend under test.
            keys: the pages to read.
            shape: bytes of each segment of a page.
        """
        pages = [self.blank(shape) for _ in keys]
        mask = each_answer("get_each", backend.get_each(keys, pages), len(keys))
        for key, page in compress(zip(keys, pages, strict=True), mask):
            wrong = page_difference(key, page)
            expect(not wrong, f"get_each says it filled the page of {key}: {wrong}")
        return mask

    def expect_pages(
        self, backend: StorageBackend, keys: Sequence[str], shape: Sequence[int]
    ) -> None:
        """Requires that ``batch_get`` fills every page with the right bytes.

        Args:
            backend: the backend under test.
            keys: the pages to read.
            shape: bytes of each segment of a page.
        """
        n_filled = self.leading_hits(backend, keys, shape)
        expect(n_filled == len(keys), f"batch_get filled {n_filled} of {len(keys)} stored pages")

    def close(self) -> None:
        """Deletes the keys of the rule, closes its backends and ends its processes."""
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        keys, self._keys = list(dict.fromkeys(self._keys)), []
        if keys:
            # Tidying up: neither a store that is gone nor one that cannot delete is a finding.
            with contextlib.suppress(NotImplementedError, BackendError):
                self.backend.delete(keys)
        while self._opened:
            self._opened.pop().close()
        self._first = None


def _anywhere(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def each_answer(call: str, answer: Sequence[bool], n_keys: int) -> list[bool]:
    """Requires that a call answered yes or no for each key; returns its answer as a list.

    Args:
        call: its name.
        answer: what it returned.
        n_keys: for how many keys it was asked.
    """
    expect(len(answer) == n_keys, f"{call} of {n_keys} keys gives {len(answer)} answers")
    others = {type(one).__name__ for one in answer if not isinstance(one, bool)}
    expect(not others, f"{call} answers with {', '.join(sorted(others))}; bool is due")
    return list(answer)


def put_each(backend: StorageBackend, keys: Sequence[str], nbytes: int) -> None:
    """Stores the objects of ``keys`` with ``set``.

    Args:
        backend: the backend under test.
        keys: an object is stored under each.
        nbytes: bytes of each object.
    """
    for key in keys:
        backend.set(key, content(key, nbytes))


def expect_hit(backend: StorageBackend, key: str, nbytes: int) -> None:
    """Requires that ``get`` returns the object of ``key`` with the right bytes.

    Args:
        backend: the backend under test.
        key: of the object.
        nbytes: bytes of the object.
    """
    expect(is_hit(backend, key, nbytes), f"get missed {key}, which is stored")


def is_hit(backend: StorageBackend, key: str, nbytes: int) -> bool:
    """Whether ``get`` finds the object of ``key``; wrong bytes break the rule.

    Args:
        backend: the backend under test.
        key: of the object.
        nbytes: bytes of the object.
    """
    value = backend.get(key)
    if value is None:
        return False
    wrong = difference(key, nbytes, value)
    expect(not wrong, f"get of {key}: {wrong}")
    return True
