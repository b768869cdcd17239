"""The faults of a soak: what is wrong with the stores at the moment, and who changes it.

The backends of this module are the real ones with faults in front of them. They all look at one
``SKY``, since a backend is made by its name and can be handed nothing.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hicache_redis import RedisBackend

from hicache_core.errors import BackendUnavailable
from hicache_core.storage.base import Buffer
from hicache_core.storage.file.backend import FileBackend
from hicache_core.testing.control import StoreControl
from hicache_core.types import Page


@dataclass(frozen=True, slots=True)
class Weather:
    """Faults that are in force together.

    Attributes:
        delay_s: every call waits so long.
        error_rate: share of calls that raise.
        damage_rate: share of pages that come back with a flipped bit.
        full: nothing can be stored.
        stuck: calls wait until the weather changes.
    """

    delay_s: float = 0.0
    error_rate: float = 0.0
    damage_rate: float = 0.0
    full: bool = False
    stuck: bool = False


class Sky:
    """The weather, and how often each fault struck; any thread."""

    def __init__(self) -> None:
        """Fair."""
        self._changed = threading.Condition()
        self._weather = Weather()
        self._rng = random.Random(0)
        self._struck: Counter[str] = Counter()

    def turn(self, weather: Weather) -> None:
        """Changes the weather; calls that are stuck go on if it lets them."""
        with self._changed:
            self._weather = weather
            self._changed.notify_all()

    def struck(self) -> dict[str, int]:
        """How often each fault struck so far."""
        with self._changed:
            return dict(sorted(self._struck.items()))

    def meet(self, *, writes: bool) -> bool:
        """What a call meets before it is made; False if the store is full.

        Raises:
            BackendUnavailable: by the error rate.
        """
        with self._changed:
            if self._weather.stuck:
                self._struck["stuck"] += 1
                self._changed.wait_for(lambda: not self._weather.stuck)
            weather, draw = self._weather, self._rng.random()
            fails, full = draw < weather.error_rate, writes and weather.full
            strikes = {"slow": weather.delay_s > 0, "flaky": fails, "full": full and not fails}
            self._struck.update(kind for kind, strikes_now in strikes.items() if strikes_now)
        time.sleep(weather.delay_s)
        if fails:
            raise BackendUnavailable("the weather is bad")
        return not full

    def damage(self, pages: Sequence[Page]) -> None:
        """Flips a bit in some of ``pages``."""
        for page in pages:
            with self._changed:
                if self._rng.random() >= self._weather.damage_rate:
                    continue
                self._struck["corrupt"] += 1
                segment = page[self._rng.randrange(len(page))]
                segment[self._rng.randrange(segment.nbytes)] ^= 1 << self._rng.randrange(8)


SKY = Sky()


class StormyFile(FileBackend):
    """The file backend under ``SKY``."""

    name: ClassVar[str] = "stormy_file"

    def batch_exists(self, keys: Sequence[str]) -> int:
        SKY.meet(writes=False)
        return super().batch_exists(keys)

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        SKY.meet(writes=False)

        def damaged(n: int) -> bool:
            SKY.damage(pages[n : n + 1])
            return arrived(n)

        return super().batch_get_visiting(keys, pages, damaged)

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        if not SKY.meet(writes=True):
            return 0
        return super().batch_set_visiting(keys, pages, leaving)

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        SKY.meet(writes=False)
        return super().exists_each(keys)

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        SKY.meet(writes=False)

        def damaged(n: int) -> bool:
            SKY.damage(pages[n : n + 1])
            return arrived(n)

        return super().get_each_visiting(keys, pages, damaged)

    def set_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[bool]:
        if not SKY.meet(writes=True):
            return [False] * len(keys)
        return super().set_each_visiting(keys, pages, leaving)


class StormyRedis(RedisBackend):
    """The Redis backend under ``SKY``."""

    name: ClassVar[str] = "stormy_redis"

    def get(self, key: str) -> Buffer | None:
        SKY.meet(writes=False)
        return super().get(key)

    def batch_exists(self, keys: Sequence[str]) -> int:
        SKY.meet(writes=False)
        return super().batch_exists(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        SKY.meet(writes=False)
        n_filled = super().batch_get(keys, pages)
        SKY.damage(pages[:n_filled])
        return n_filled

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return super().batch_set(keys, pages) if SKY.meet(writes=True) else 0

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        SKY.meet(writes=False)
        return super().exists_each(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        SKY.meet(writes=False)
        mask = super().get_each(keys, pages)
        SKY.damage([page for page, is_filled in zip(pages, mask, strict=True) if is_filled])
        return mask

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        if not SKY.meet(writes=True):
            return [False] * len(keys)
        return super().set_each(keys, pages)


class Seasons:
    """A thread that changes the weather and the server every now and then.

    Every other spell is fair, so that something is stored and can be read.
    """

    def __init__(self, server: StoreControl, seed: int, spell_s: float) -> None:
        """Starts nothing.

        Args:
            server: under the Redis backend.
            seed: of the weather.
            spell_s: how long one weather lasts on average.
        """
        self._server = server
        self._rng = random.Random(seed)
        self._spell_s = spell_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak-seasons")
        self.server_events: Counter[str] = Counter()

    def start(self) -> None:
        """Begins with fair weather."""
        self._thread.start()

    def stop(self) -> None:
        """Ends with fair weather and a running server."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        for kind in itertools.cycle(("slow", "flaky", "corrupt", "full", "stuck")):
            if self._wait():
                return
            self._storm(kind)

    def _wait(self) -> bool:
        return self._over.wait(self._spell_s * self._rng.uniform(0.5, 1.5))

    def _storm(self, kind: str) -> None:
        """Bad weather of one kind for sure, and of others by chance."""
        rng = self._rng
        SKY.turn(
            Weather(
                delay_s=rng.choice([0.002, 0.02, 0.1]) if self._is_on(kind, "slow") else 0.0,
                error_rate=rng.choice([0.1, 0.3, 1.0]) if self._is_on(kind, "flaky") else 0.0,
                damage_rate=rng.choice([0.1, 0.5]) if self._is_on(kind, "corrupt") else 0.0,
                full=self._is_on(kind, "full"),
                stuck=self._is_on(kind, "stuck"),
            )
        )
        what = rng.choice(["", "", "kill", "freeze"])
        try:
            if what:
                self.server_events[what] += 1
                getattr(self._server, what)()
            self._wait()
        finally:
            if what:
                {"kill": self._server.restart, "freeze": self._server.thaw}[what]()
            SKY.turn(Weather())

    def _is_on(self, kind: str, asked: str) -> bool:
        return kind == asked or self._rng.random() < 0.3
