"""What a test left behind: open caches, pages and locks of a closed one, threads, descriptors.

``tests/page_path/conftest.py`` watches every test of the page path with it.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from hicache_core.controller.controller import Controller
from hicache_core.errors import IntegrityError
from hicache_core.radix.node import Node

PATIENCE_S = 2.0
"""A thread that was let go may take so long to end, a socket so long to close."""


class LeakWatch:
    """Follows each cache that is opened while it watches, and says what is not given back."""

    def __init__(self) -> None:
        """Looks at what there is before the test."""
        self._patch = pytest.MonkeyPatch()
        self._open: list[Controller] = []
        self._locks: Counter[int] = Counter()  # by id of the cache
        self._wrong: list[str] = []
        self._threads = _threads()
        self._descriptors = _descriptors()

    def start(self) -> None:
        """Follows every ``Controller`` from now on."""
        for name in ("__init__", "lock", "unlock", "close"):
            self._patch.setattr(Controller, name, self._followed(name, getattr(Controller, name)))

    def stop(self) -> list[str]:
        """Follows no more; what is wrong, a line each. Closes what was left open."""
        self._patch.undo()
        for cache in self._open:
            self._wrong.append("a cache was not closed")
            cache.close(timeout_s=0.1)
        self._open.clear()
        extra = _settled(lambda: _threads() - self._threads)
        if extra:
            self._wrong.append(f"threads still run: {sorted(extra)}")
        descriptors = _settled(lambda: set((_descriptors() - self._descriptors).elements()))
        if descriptors:
            self._wrong.append(f"descriptors are still open: {sorted(descriptors)}")
        return list(dict.fromkeys(self._wrong))

    def _followed(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        def make(cache: Controller, *args: object, **kwargs: object) -> None:
            original(cache, *args, **kwargs)
            self._open.append(cache)

        def lock(cache: Controller, node: Node) -> None:
            original(cache, node)
            self._locks[id(cache)] += 1

        def unlock(cache: Controller, node: Node) -> None:
            original(cache, node)
            self._locks[id(cache)] -= 1

        def close(cache: Controller, *args: object, **kwargs: object) -> object:
            if cache in self._open:
                self._open.remove(cache)
                self._examine(cache)
            return original(cache, *args, **kwargs)

        return {"__init__": make, "lock": lock, "unlock": unlock, "close": close}[name]

    def _examine(self, cache: Controller) -> None:
        """What the engine still holds of a cache that it closes."""
        try:
            cache.check_integrity()
        except IntegrityError as error:
            self._wrong.append(f"at close: {error}")
        if n_locks := self._locks.pop(id(cache), 0):
            self._wrong.append(f"at close: {n_locks} locks were not taken back")
        allocator = cache.parts.device.allocator
        held = allocator.n_pages - allocator.n_free - cache.parts.tree.n_device_pages
        if held:
            self._wrong.append(f"at close: {held} device pages were neither inserted nor freed")


@pytest.fixture(autouse=True)
def leak_watch() -> Iterator[None]:
    """Fails a test that leaves caches, locks, pages, threads or descriptors behind.

    It begins before the test's own fixtures and ends after them; those of the module are not its
    business.
    """
    watch = LeakWatch()
    watch.start()
    yield
    wrong = watch.stop()
    if wrong:
        pytest.fail("\n".join(["the test leaks", *wrong]), pytrace=False)


def _threads() -> set[str]:
    return {f"{t.name} ({t.ident})" for t in threading.enumerate() if "hicache" in t.name}


def _descriptors() -> Counter[str]:
    """Open descriptors by what they lead to, without the numbers of sockets and pipes."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{fd}").rstrip("0123456789[]")] += 1
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


def _settled(extra: Callable[[], set[str]]) -> set[str]:
    """``extra()`` once it is empty, or after a while."""
    if not extra():
        return set()
    gc.collect()
    until = time.monotonic() + PATIENCE_S
    while (found := extra()) and time.monotonic() < until:
        time.sleep(0.002)
    return found
