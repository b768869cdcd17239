"""Copies between device pages and host pages: the contract."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from typing import TypeAlias

from hicache_core.errors import IntegrityError, LoadFailed, SpecError, UseAfterClose
from hicache_core.pools.allocator import check_page_ids
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool

PageIds: TypeAlias = "array[int]"


class Direction(enum.Enum):
    """Which way a copy goes."""

    TO_HOST = "to_host"
    TO_DEVICE = "to_device"


class Ticket(ABC):
    """One copy. The owner thread calls these methods; the copy itself runs elsewhere."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the copy has ended, well or not; never blocks."""

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> bool:
        """Blocks until the copy has ended, or for ``timeout_s``; whether it has ended."""

    @abstractmethod
    def wait_layer(self, layer: int) -> None:
        """Ensures that what the caller computes next sees the rows of this layer.

        On a CPU this blocks until they have arrived. On CUDA it makes the current stream wait and
        returns at once. ``layer`` counts from 0 among the layers of this process.

        Raises:
            LoadFailed: the copy failed; the pages hold nothing.
        """

    @property
    @abstractmethod
    def error(self) -> BaseException | None:
        """Why the copy failed; None while it runs and if it succeeded."""


class FailedTicket(Ticket):
    """A copy that could not be started."""

    def __init__(self, error: Exception) -> None:
        """Takes the error that prevented the copy."""
        self._error = error

    def done(self) -> bool:
        # docstring inherited
        return True

    def wait(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002 - it has ended
        # docstring inherited
        return True

    def wait_layer(self, layer: int) -> None:
        # docstring inherited
        raise LoadFailed(f"the copy of layer {layer} failed: {self._error!r}") from self._error

    @property
    def error(self) -> BaseException | None:
        # docstring inherited
        return self._error


CopyLayers: TypeAlias = Callable[[range], None]
"""Copies the rows of these layers, all components, all pages of one ticket."""


class CopyQueue(ABC):
    """Where copies run, one after the other."""

    @abstractmethod
    def open(self) -> None:
        """Starts what runs the copies."""

    @abstractmethod
    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        """Queues a copy: calls ``copy(step)`` for each step, in order, after all earlier copies.

        Raises:
            UseAfterClose: the queue is closed, or was never opened.
        """

    @abstractmethod
    def close(self) -> None:
        """Returns when all submitted copies have ended; a second call does nothing."""


class Transfer(ABC):
    """Moves whole pages between a device pool and a host pool.

    The owner thread calls everything. Pages that a ticket names belong to it until ``done()``:
    nobody else may write them, nor read those that it writes. A subclass says how rows are copied;
    the queue says where that runs.
    """

    def __init__(
        self,
        device_pool: DevicePool,
        host_pool: HostPool,
        queue: CopyQueue,
        store_queue: CopyQueue | None = None,
    ) -> None:
        """Keeps its arguments; ``open`` starts the queues.

        Args:
            device_pool: the device pool.
            host_pool: the host pool, with the same spec and page size.
            queue: where copies run.
            store_queue: where copies to the host run, if not in ``queue``: on CUDA a second
                stream, so that both directions of the bus are used at the same time.

        Raises:
            SpecError: the pools do not hold the same kind of page.
        """
        device_kind = (device_pool.spec, device_pool.page_size)
        host_kind = (host_pool.spec, host_pool.page_size)
        if device_kind != host_kind:
            raise SpecError(
                f"device pages {device_kind} are not of the kind of host pages {host_kind}"
            )
        self.device_pool = device_pool
        self.host_pool = host_pool
        self._loads = queue
        self._stores = store_queue or queue
        self._num_layers = device_pool.spec.num_layers

    def open(self) -> None:
        """Starts what runs the copies."""
        for queue in {self._loads, self._stores}:
            queue.open()

    def to_host(self, device_pages: PageIds, host_pages: PageIds) -> Ticket:
        """Copies ``device_pages[i]`` to ``host_pages[i]``, all layers at once.

        Raises:
            IntegrityError: the lists differ in length, or a page is not of its pool.
            UseAfterClose: after ``close``.
        """
        self._check(device_pages, host_pages)
        steps = [range(self._num_layers)]
        return self._begin(Direction.TO_HOST, steps, device_pages, host_pages)

    def to_device(self, host_pages: PageIds, device_pages: PageIds) -> Ticket:
        """Copies ``host_pages[i]`` to ``device_pages[i]``, layer by layer, layer 0 first.

        Raises:
            IntegrityError: the lists differ in length, or a page is not of its pool.
            UseAfterClose: after ``close``.
        """
        self._check(device_pages, host_pages)
        steps = [range(layer, layer + 1) for layer in range(self._num_layers)]
        return self._begin(Direction.TO_DEVICE, steps, device_pages, host_pages)

    def close(self) -> None:
        """Waits for submitted copies and stops the queues; a second call does nothing."""
        for queue in {self._loads, self._stores}:
            queue.close()

    @abstractmethod
    def _prepare(
        self, direction: Direction, device_pages: PageIds, host_pages: PageIds
    ) -> CopyLayers:
        """A function that copies the rows of these pages; owner thread, must not block."""

    def _begin(
        self, direction: Direction, steps: list[range], device_pages: PageIds, host_pages: PageIds
    ) -> Ticket:
        """Starts a copy; if that fails, returns a ticket that has failed, which callers handle."""
        queue = self._stores if direction is Direction.TO_HOST else self._loads
        try:
            return queue.submit(steps, self._prepare(direction, device_pages, host_pages))
        except UseAfterClose:
            raise
        except (RuntimeError, MemoryError, OSError) as error:  # of torch, CUDA and threads
            return FailedTicket(error)

    def _check(self, device_pages: PageIds, host_pages: PageIds) -> None:
        if len(device_pages) != len(host_pages):
            raise IntegrityError(
                f"{len(device_pages)} device pages and {len(host_pages)} host pages in one transfer"
            )
        check_page_ids(device_pages, self.device_pool.n_pages, "device")
        check_page_ids(host_pages, self.host_pool.n_pages, "host")
