"""Keys whose load has failed recently."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class FailedKeys:
    """Remembers keys for a limited time; forgets the oldest first. Any thread may call any method.

    A store may report a key as present and fail to load it each time. Without this, every request
    for that key would try again.
    """

    def __init__(self, ttl_s: float, max_keys: int, clock: Callable[[], float]) -> None:
        """Remembers nothing yet.

        Args:
            ttl_s: how long a key is remembered, in seconds.
            max_keys: maximum number of keys; 0 for none.
            clock: seconds; only differences count.
        """
        self._ttl_s = ttl_s
        self._max_keys = max_keys
        self._clock = clock
        self._lock = threading.Lock()
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def remember(self, keys: Iterable[str]) -> None:
        """Remembers ``keys`` as failed for ``ttl_s`` from now on."""
        with self._lock:
            until_s = self._clock() + self._ttl_s
            for key in keys:
                self._until_s[key] = until_s
                self._until_s.move_to_end(key)
            while len(self._until_s) > self._max_keys:
                self._until_s.popitem(last=False)

    def forget(self, keys: Iterable[str]) -> None:
        """Forgets ``keys``, which were loaded or stored."""
        if not self._until_s:
            return
        with self._lock:
            for key in keys:
                self._until_s.pop(key, None)

    def among(self, keys: Sequence[str]) -> frozenset[str]:
        """Returns those of ``keys`` that are remembered as failed."""
        if not self._until_s:
            return frozenset()
        with self._lock:
            now = self._clock()
            known = {key: self._until_s[key] for key in keys if key in self._until_s}
            for key, until_s in known.items():
                if now >= until_s:
                    del self._until_s[key]
            return frozenset(key for key, until_s in known.items() if now < until_s)

    def n_leading_good(self, keys: Sequence[str]) -> int:
        """Returns how many leading keys are not remembered as failed."""
        if not self._until_s:
            return len(keys)
        with self._lock:
            now = self._clock()
            for n, key in enumerate(keys):
                until_s = self._until_s.get(key)
                if until_s is None:
                    continue
                if now < until_s:
                    return n
                del self._until_s[key]
            return len(keys)
