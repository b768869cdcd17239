"""The keys whose load failed a short while ago."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence


class FailedKeys:
    """Remembers keys for a while; the oldest are forgotten first. Any thread may call any method.

    A store that says a key is there and then fails to load it would be asked for ever: the answer
    "it is there" never becomes wrong by itself.
    """

    def __init__(self, ttl_s: float, max_keys: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._max_keys = max_keys
        self._clock = clock
        self._lock = threading.Lock()
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def remember(self, key: str) -> None:
        """From now on ``key`` counts as failed, for the set time."""
        with self._lock:
            self._until_s[key] = self._clock() + self._ttl_s
            self._until_s.move_to_end(key)
            while len(self._until_s) > self._max_keys:
                self._until_s.popitem(last=False)

    def forget(self, keys: Sequence[str], n: int) -> None:
        """The first ``n`` of ``keys`` were loaded or stored: they count as failed no more."""
        if not self._until_s:
            return
        with self._lock:
            for key in keys[:n]:
                self._until_s.pop(key, None)

    def n_leading_good(self, keys: Sequence[str]) -> int:
        """How many leading keys have not failed."""
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
