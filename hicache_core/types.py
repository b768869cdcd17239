"""The data that travels between threads: frozen, without behaviour."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

__all__ = ["BackendContext", "CachedTokens", "Namespace", "Page", "Tier"]

Page: TypeAlias = Sequence[memoryview]
"""The segments of one stored object, in order; the object is their concatenation.

Each segment is a writable, C-contiguous memoryview of format ``B``. A page that a controller hands
to the storage worker starts with its 64-byte header segment (see ``storage.sealed``).
"""


@dataclass(frozen=True, slots=True)
class Namespace:
    """What separates requests whose token ids are equal; it seeds the chain of page keys.

    Attributes:
        extra_key: any text that separates caches (SGLang's ``extra_key``).
        cache_salt: the tenant's salt.
        lora_id: the LoRA adapter whose weights took part in the KV.
        variant: a digest of what else took part in it: weights that changed after the model was
            opened, embeddings in place of tokens. Set by integrations, never by a client.
    """

    extra_key: str | None = None
    cache_salt: str | None = None
    lora_id: str | None = None
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Cached tokens of a prompt, by the tier where they were when the turn began.

    A page counts for the farthest tier that something of it came from: its KV in layers with full
    attention, its part of a window, or the state at its end.
    """

    device: int = 0
    host: int = 0
    storage: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.device + self.host + self.storage


class ExistsJob(NamedTuple):
    """A lookup in storage: how many leading pages of ``keys`` are present?

    With ``each``, which of them are (``JobResult.mask``); likewise for reads and writes.
    """

    job_id: int
    keys: Sequence[str]
    each: bool = False


class ReadJob(NamedTuple):
    """Fill ``pages`` with the objects under ``keys``, leading ones first (same length)."""

    job_id: int
    keys: Sequence[str]
    pages: Sequence[Page]
    nbytes: int
    each: bool = False


class WriteJob(NamedTuple):
    """Store ``pages`` under ``keys``, leading ones first (same length)."""

    job_id: int
    keys: Sequence[str]
    pages: Sequence[Page]
    nbytes: int
    each: bool = False


Job: TypeAlias = ExistsJob | ReadJob | WriteJob


class Tier(enum.Enum):
    """Where pages are kept."""

    DEVICE = "device"
    HOST = "host"
    STORAGE = "storage"


class JobState(enum.Enum):
    """How a job ended, or that it is overdue."""

    DONE = "done"  # the backend answered; n_pages may still be 0
    FAILED = "failed"  # the backend raised; n_pages is 0
    CANCELLED = "cancelled"  # never started; n_pages is 0 and no byte was touched
    OVERDUE = "overdue"  # runs beyond its deadline; n_pages is 0, and its bytes may be touched


class JobResult(NamedTuple):
    """What came of a job; every submitted job yields exactly one final result.

    A job that runs past its deadline yields one OVERDUE result before it: no request needs to wait
    for it any longer, but its pages may be read or written until the final result comes.

    Attributes:
        job: the job itself.
        state: how it ended.
        n_pages: leading pages present, filled or stored.
        error: what went wrong, for logs; empty unless FAILED or OVERDUE.
        error_kind: class name of the exception, such as ``BreakerOpen``; empty likewise.
        elapsed_s: time the backend took.
        mask: for each page whether it is present, was filled or is stored, if the job asked for
            ``each`` and is DONE; else None.
    """

    job: Job
    state: JobState
    n_pages: int
    error: str = ""
    elapsed_s: float = 0.0
    error_kind: str = ""
    mask: Sequence[bool] | None = None


@dataclass(frozen=True, slots=True)
class BackendContext:
    """What a backend may know about the cache that uses it.

    Attributes:
        namespace: hex digest that prefixes every key (``<namespace>/<page hash>``).
        object_nbytes: size of every stored object, header included, or of the largest if they
            have several sizes; 0 if not fixed.
        rank: this process among those that share the cache.
        world_size: how many processes share the cache.
        creates: False for a command that only reads a store. If the store does not exist, the
            backend then raises ``BackendUnavailable`` instead of creating it.
        least_nbytes: size of the smallest stored object if they have several sizes, as those of a
            model with groups of layers, which have namespaces of their own; 0 if all have
            ``object_nbytes``.
        read_only: whether the backend is only read. Opening it changes nothing in the store then,
            not even for a test of its rights; ``set`` and ``delete`` are never called.
    """

    namespace: str
    object_nbytes: int = 0
    rank: int = 0
    world_size: int = 1
    creates: bool = True
    least_nbytes: int = 0
    read_only: bool = False
