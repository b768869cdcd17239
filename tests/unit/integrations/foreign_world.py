"""Stores of an engine over backends that fail on purpose, and the engine's pages."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Sequence

from hicache_core.build.storage import Composed
from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.integrations.foreign.opening import store_on
from hicache_core.integrations.foreign.store import Answer, ForeignStore
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import BackendContext, Page

NBYTES = 4096
NAMESPACE = ForeignNamespace("an engine", "1", "name:a model", "page_first", 16, NBYTES)
PATTERN = b"\xa5"


class Bounded(BackendWrapper):
    """Says that it bounds its calls."""

    def bounds_calls(self) -> bool:
        return True


class Unbounded(BackendWrapper):
    """Says that it does not bound its calls."""

    def bounds_calls(self) -> bool:
        return False


def memory() -> MemoryBackend:
    return MemoryBackend(MemoryConfig(), BackendContext(""))


def opened(
    backend: StorageBackend,
    *,
    direct: bool = False,
    deadline_s: float = 60.0,
    n_threads: int = 2,
    staging_nbytes: int = 1 << 20,
    object_nbytes: int = 0,
    per_gib_s: float = 0.0,
    guarded: bool = True,
) -> ForeignStore:
    """A store over ``backend`` with seal and, unless told otherwise, guard."""
    said = Bounded(backend) if direct else Unbounded(backend)
    config = GuardConfig(
        deadline_base_s=deadline_s, deadline_per_gib_s=per_gib_s, retries=0, min_calls=1_000_000
    )
    seal = SealedBackend(said)
    guard = GuardedBackend(seal, config)
    made = Composed(guard if guarded else seal, (guard,), (seal,), config.deadlines)
    return store_on(
        made, object_nbytes=object_nbytes, n_threads=n_threads, staging_nbytes=staging_nbytes
    )


def keys_of(names: Sequence[object], namespace: ForeignNamespace = NAMESPACE) -> list[str]:
    return [namespace.key(hashlib.sha256(repr(name).encode()).digest()) for name in names]


def content(name: object, nbytes: int = NBYTES) -> bytes:
    """The bytes that belong to a name."""
    return hashlib.shake_128(repr(name).encode()).digest(nbytes)


def page_of(data: bytes, n_segments: int = 2) -> Page:
    """The bytes in memory of the engine, in segments."""
    step = -(-len(data) // n_segments)
    return [memoryview(bytearray(data[i : i + step])) for i in range(0, len(data), step)]


def pages_of(names: Sequence[object], nbytes: int = NBYTES) -> list[Page]:
    return [page_of(content(name, nbytes)) for name in names]


def patterned(n: int, nbytes: int = NBYTES) -> list[Page]:
    """Pages of the engine that hold the pattern."""
    return [page_of(PATTERN * nbytes) for _ in range(n)]


def bytes_in(page: Page) -> bytes:
    return b"".join(page)


def answer_of(submit: Callable[[Callable[[Answer], None]], None], timeout_s: float = 20) -> Answer:
    """The answer of a background call."""
    answers: queue.Queue[Answer] = queue.Queue()
    submit(answers.put)
    return answers.get(timeout=timeout_s)
