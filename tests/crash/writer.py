"""A process that stores sealed pages from several threads until it is killed, or told to stop."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.testing.content import content
from hicache_core.types import BackendContext, Page
from tests.crash.reports import Batch, line, payload_nbytes

N_THREADS = 3


def opened(path: Path, max_nbytes: int) -> SealedBackend:
    """The store in ``path``, sealed and open."""
    config = FileConfig(path=path, max_nbytes=max_nbytes, io_threads=2)
    backend = SealedBackend(FileBackend(config, BackendContext(namespace="0" * 16)))
    backend.open()
    return backend


def page_of(key: str) -> Page:
    """The page that belongs under ``key``, its header not yet written."""
    payload = bytearray(content(key, payload_nbytes(key)))
    return memoryview(bytearray(HEADER_NBYTES)), memoryview(payload)


def empty_page(key: str) -> Page:
    """Room for the page under ``key``."""
    return memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(payload_nbytes(key)))


def read(backend: SealedBackend, keys: Sequence[str]) -> int:
    """How many leading pages the store has.

    Raises:
        AssertionError: one of them is not what belongs under its key.
    """
    pages = [empty_page(key) for key in keys]
    n = backend.batch_get(keys, pages)
    for key, page in zip(keys[:n], pages, strict=False):
        assert page[1] == content(key, payload_nbytes(key)), f"wrong bytes under {key}"
    return n


class Plan(NamedTuple):
    """What one writer does.

    Attributes:
        run: which start of a writer it is.
        seed: of what its threads draw.
        pause_s: they rest so long between two calls.
    """

    run: int
    seed: int
    pause_s: float = 0.0


class _Thread:
    """What one thread of a writer does, again and again."""

    def __init__(self, backend: SealedBackend, pipe: int, plan: Plan, thread: int) -> None:
        self._backend = backend
        self._pipe = pipe
        self._run = plan.run
        self._thread = thread
        self._rng = random.Random(f"{plan.seed} {plan.run} {thread}")
        self._n_objects = 0
        self._kept: list[Batch] = []
        self._scratch: list[Batch] = []

    def step(self) -> None:
        draw = self._rng.random()
        if draw < 0.55:
            self._kept += self._store(scratch=False)
        elif draw < 0.70:
            self._scratch += self._store(scratch=True)
        elif draw < 0.80:
            self._read()
        elif draw < 0.93:
            self._delete()
        else:
            self._clear()

    def _say(self, word: str, *batches: Batch) -> None:
        for batch in batches:
            os.write(self._pipe, line(word, time.time(), batch))

    def _store(self, *, scratch: bool) -> list[Batch]:
        n = self._rng.randrange(1, 8)
        batch = Batch(self._run, self._thread, self._n_objects, n, scratch)
        self._n_objects += n
        keys = batch.page_keys()
        pages = [page_of(key) for key in keys]
        self._say("store", batch)
        if self._backend.batch_set(keys, pages) != n:
            return []  # a full store: what it took of the batch may be there, and nobody is told
        self._say("stored", batch)
        return [batch]

    def _read(self) -> None:
        if self._kept:
            read(self._backend, self._rng.choice(self._kept).page_keys())

    def _delete(self) -> None:
        if not self._kept:
            return
        batch = self._kept.pop(self._rng.randrange(len(self._kept)))
        self._say("drop", batch)
        self._backend.delete(batch.page_keys())
        self._say("dropped", batch)

    def _clear(self) -> None:
        if not self._scratch:
            return
        batches, self._scratch = self._scratch, []
        self._say("drop", *batches)
        self._backend.inner.clear(batches[0].namespace + "/")
        self._say("dropped", *batches)


def write(path: Path, max_nbytes: int, speak: int, listen: int, plan: Plan) -> None:
    """Works until ``listen`` (a descriptor) can be read; says over ``speak`` what it does.

    Raises:
        AssertionError: a thread read wrong bytes, or failed in another way.
    """
    backend = opened(path, max_nbytes)
    stopped = threading.Event()
    failures: list[BaseException] = []

    def work(thread: _Thread) -> None:
        try:
            while not stopped.wait(plan.pause_s):
                thread.step()
        except BaseException as exc:
            failures.append(exc)
            raise

    threads = [
        threading.Thread(target=work, args=(_Thread(backend, speak, plan, n),))
        for n in range(N_THREADS)
    ]
    for thread in threads:
        thread.start()
    os.read(listen, 1)
    stopped.set()
    for thread in threads:
        thread.join()
    backend.close()
    assert not failures, failures
