"""The move itself: a few workers, each of which reads, checks and writes a batch at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from hicache_core.storage.moving.base import Batch, Source, Target
from hicache_core.storage.moving.outcomes import Outcome, Result, Totals
from hicache_core.storage.moving.slab import Slab

DEFAULT_THREADS = 2
DEFAULT_SLAB_NBYTES = 8 << 20
"""Memory of a worker. Smaller batches ask the stores more often; larger ones leave the processor's
cache between read and write."""

_LOOK_S = 0.2

Told = Callable[[Sequence[Result]], None]


def make_slabs(
    n_threads: int = DEFAULT_THREADS,
    object_nbytes: int = 0,
    slab_nbytes: int = DEFAULT_SLAB_NBYTES,
) -> list[Slab]:
    """Memory for the workers of a move.

    Args:
        n_threads: how many workers.
        object_nbytes: length of the longest object; 0 if it is not known.
        slab_nbytes: bytes for each, unless one object is longer.
    """
    return [Slab(max(slab_nbytes, object_nbytes)) for _ in range(n_threads)]


def move(source: Source, target: Target, slabs: Sequence[Slab], told: Told) -> Totals:
    """Moves everything that ``source`` has and ``target`` lacks. Blocks until that is done.

    A second call goes on where the first was interrupted: what the target has is not read again.
    When the target has no room for any object of a batch, the move stops and says so.

    Args:
        source: of the objects.
        target: for the objects.
        slabs: memory, one for each worker.
        told: called with the results of each batch, by one worker at a time.

    Returns:
        The sums of what was moved.

    Raises:
        BackendError: a store failed; the batches that other workers had begun are done.
        OSError: an archive cannot be read or written.
    """
    mover = _Mover(source, target, told)
    with ThreadPoolExecutor(len(slabs), thread_name_prefix="hicache-move") as pool:
        runs = [pool.submit(mover.run, slab) for slab in slabs]
        try:
            left = set(runs)
            while left:  # in short turns, so that an interrupt is seen
                done, left = wait(left, timeout=_LOOK_S, return_when=FIRST_EXCEPTION)
                if any(run.exception() for run in done):
                    mover.stop.set()
        finally:
            mover.stop.set()
    for run in runs:
        run.result()
    return mover.totals


class _Mover:
    """What the workers of one move share."""

    def __init__(self, source: Source, target: Target, told: Told) -> None:
        self.stop = threading.Event()
        self.totals = Totals()
        self._source = source
        self._target = target
        self._told = told
        self._lock = threading.Lock()

    def run(self, slab: Slab) -> None:
        """The work of one worker."""
        while not self.stop.is_set():
            batch = self._source.take(slab, self._target)
            if batch is None:
                return
            self._settle(batch, self._target.write(batch.intact) if batch.intact else ())

    def _settle(self, batch: Batch, written: Sequence[bool]) -> None:
        results = [*batch.others, *_ended(batch, written)]
        with self._lock:
            for result in results:
                self.totals.add(result)
            if written and not any(written):
                self.totals.stopped = "the target has no room for more"
                self.stop.set()
            self._told(results)


def _ended(batch: Batch, written: Sequence[bool]) -> Iterator[Result]:
    for one, is_there in zip(batch.intact, written, strict=True):
        yield one.ended(Outcome.COPIED if is_there else Outcome.NO_ROOM)
