"""The way to the store: slow, broken, stuck and corrupting as the weather of a rank says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from hicache_core.errors import BackendError, BackendTimeout, BackendUnavailable
from hicache_core.storage.base import Buffer, StorageBackend
from hicache_core.storage.segments import nbytes_of
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import Page
from tests.simulation.clock import Process

ERRORS: tuple[type[Exception], ...] = (BackendUnavailable, BackendTimeout, BackendError, ValueError)
"""What a backend may raise: its own errors, and what it should not."""


@dataclass(slots=True)
class Weather:
    """How the store treats one rank now.

    Attributes:
        delay_s: what an operation takes at most.
        error_rate: share of the operations that raise.
        hang_rate: share of the operations that never return.
        damage_rate: share of the objects that arrive damaged, or are stored so.
    """

    delay_s: float = 0.01
    error_rate: float = 0.0
    hang_rate: float = 0.0
    damage_rate: float = 0.0

    @classmethod
    def drawn(cls, draw: Random) -> Weather:
        """Some weather."""
        return cls(
            delay_s=draw.choice((0.0, 0.01, 0.01, 0.1, 1.0, 5.0)),
            error_rate=draw.choice((0.0, 0.0, 0.0, 0.1, 0.5, 1.0)),
            hang_rate=draw.choice((0.0, 0.0, 0.05, 0.3)),
            damage_rate=draw.choice((0.0, 0.0, 0.05, 0.5)),
        )


class Link(BackendWrapper):
    """One operation of the store after the other, each with a time and faults of its own.

    Pages are filled and read segment by segment, and time passes in between: as with real memory
    under a real transport, whoever touches them meanwhile is seen.
    """

    def __init__(
        self, inner: StorageBackend, process: Process, weather: Weather, draw: Random
    ) -> None:
        """Wraps ``inner``; ``weather`` may change at any time."""
        super().__init__(inner)
        self._process = process
        self._weather = weather
        self._draw = draw

    def get(self, key: str) -> Buffer | None:
        # docstring inherited
        self._pass_time()
        value = self.inner.get(key)
        return None if value is None else self._perhaps_damaged(bytes(value))

    def exists(self, key: str) -> bool:
        # docstring inherited
        self._pass_time()
        return self.inner.exists(key)

    def set(self, key: str, value: Buffer) -> None:
        # docstring inherited
        self._pass_time()
        self.inner.set(key, self._perhaps_damaged(bytes(value)))
        if self._draw.random() < self._weather.error_rate:
            raise BackendTimeout("injected fault: stored, but the answer was lost")

    def delete(self, keys: Sequence[str]) -> None:
        # docstring inherited
        self._pass_time()
        self.inner.delete(keys)

    def batch_exists(self, keys: Sequence[str]) -> int:
        # docstring inherited
        self._pass_time()
        return self.inner.batch_exists(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        # docstring inherited
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            value = self.get(key)
            if value is None or len(value) != nbytes_of(page):
                for undefined in pages[n:]:
                    self._scribble(undefined)
                return n
            start = 0
            for segment in page:
                segment[:] = value[start : start + segment.nbytes]
                start += segment.nbytes
                self._perhaps_sleep()
        return len(keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        # docstring inherited
        for key, page in zip(keys, pages, strict=True):
            value = bytearray()
            for segment in page:
                value += segment
                self._perhaps_sleep()
            self.set(key, value)
        return len(keys)

    def _pass_time(self) -> None:
        weather, draw = self._weather, self._draw
        self._process.sleep(draw.random() * weather.delay_s)
        if draw.random() < weather.hang_rate:
            self._process.hang()
        if draw.random() < weather.error_rate:
            raise draw.choice(ERRORS)("injected fault")

    def _perhaps_sleep(self) -> None:
        if self._draw.random() < 0.1:
            self._process.sleep(self._draw.random() * self._weather.delay_s)

    def _perhaps_damaged(self, value: bytes) -> bytes:
        if self._draw.random() < self._weather.damage_rate:
            return damaged(value, self._draw)
        return value

    def _scribble(self, page: Page) -> None:
        """A page that was not filled holds anything: that is the contract."""
        if self._draw.random() < 0.5:
            segment = page[-1]
            segment[:] = self._draw.randbytes(segment.nbytes)


def damaged(value: bytes, draw: Random) -> bytes:
    """An object with a bit flipped, cut short, or replaced by as many random bytes."""
    if not value:
        return value  # it was cut to nothing before
    kind = draw.randrange(3)
    if kind == 0:
        at = draw.randrange(len(value))
        return value[:at] + bytes([value[at] ^ (1 << draw.randrange(8))]) + value[at + 1 :]
    return value[: draw.randrange(len(value))] if kind == 1 else draw.randbytes(len(value))
