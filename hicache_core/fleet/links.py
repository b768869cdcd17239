"""Time: the clock of a server, links that take time for bytes, and copies that move none."""

from __future__ import annotations

from dataclasses import dataclass

from hicache_core.copies.base import CopyLayers, CopyQueue, Direction, PageIds, Ticket, Transfer


@dataclass(slots=True)
class Clock:
    """The time of one server. It passes while the server computes or waits, and never goes back.

    Attributes:
        now: seconds since the start.
    """

    now: float = 0.0

    def __call__(self) -> float:
        """The time, as a cache asks for it."""
        return self.now

    def reach(self, at_s: float) -> None:
        """Waits until ``at_s``, unless that is over."""
        self.now = max(self.now, at_s)

    def advance(self, seconds: float) -> None:
        """Lets ``seconds`` pass."""
        self.now += seconds


@dataclass(slots=True)
class Link:
    """Moves bytes, first come, first served.

    Attributes:
        nbytes_per_s: its bandwidth.
        free_s: when it has moved all that it was given.
        moved_nbytes: what it was given so far.
    """

    nbytes_per_s: float
    free_s: float = 0.0
    moved_nbytes: int = 0

    def take(self, at_s: float, nbytes: int) -> float:
        """When ``nbytes`` that are ready at ``at_s`` have been moved."""
        self.free_s = max(self.free_s, at_s) + nbytes / self.nbytes_per_s
        self.moved_nbytes += nbytes
        return self.free_s


class TimedTicket(Ticket):
    """A copy that ends at a known time; whoever waits for it lets that time come."""

    def __init__(self, clock: Clock, begins_s: float, done_s: float, n_layers: int) -> None:
        """Keeps its arguments.

        Args:
            clock: of the server.
            begins_s: when the first byte moves.
            done_s: when the last byte has moved.
            n_layers: layers, which arrive one after the other.
        """
        self.begins_s = begins_s
        self.done_s = done_s
        self._clock = clock
        self._n_layers = n_layers

    def done(self) -> bool:
        # docstring inherited
        return self._clock.now >= self.done_s

    def wait(self, timeout_s: float | None = None) -> bool:
        # docstring inherited
        self._clock.reach(
            self.done_s if timeout_s is None else min(self.done_s, self._clock.now + timeout_s)
        )
        return self.done()

    def wait_layer(self, layer: int) -> None:
        # docstring inherited
        share = (layer + 1) / self._n_layers
        self._clock.reach(self.begins_s + share * (self.done_s - self.begins_s))

    @property
    def error(self) -> BaseException | None:
        # docstring inherited
        return None


@dataclass(frozen=True, slots=True)
class _Moved:
    """In place of a function that copies pages: says how many, and copies nothing."""

    n_pages: int

    def __call__(self, _layers: range) -> None:
        pass


class TimedQueue(CopyQueue):
    """Copies one after the other, over a link."""

    def __init__(self, clock: Clock, link: Link, page_nbytes: int) -> None:
        """Keeps its arguments.

        Args:
            clock: of the server.
            link: from the device to the host, or back.
            page_nbytes: bytes of a page.
        """
        self.link = link
        self._clock = clock
        self._page_nbytes = page_nbytes

    def open(self) -> None:
        # docstring inherited
        pass

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        # docstring inherited
        assert isinstance(copy, _Moved)
        begins_s = max(self._clock.now, self.link.free_s)
        done_s = self.link.take(self._clock.now, copy.n_pages * self._page_nbytes)
        return TimedTicket(self._clock, begins_s, done_s, len(steps))

    def close(self) -> None:
        # docstring inherited
        pass


class TimedTransfer(Transfer):
    """Copies between pools that have no bytes; only time passes."""

    def _prepare(
        self,
        direction: Direction,  # noqa: ARG002
        device_pages: PageIds,
        host_pages: PageIds,  # noqa: ARG002
    ) -> CopyLayers:
        # docstring inherited
        return _Moved(len(device_pages))
