"""Attachment: a storage backend that is attached, and one that is on its way to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hicache_core.controller.admission import Admission, AlwaysAdmit
from hicache_core.errors import HiCacheError
from hicache_core.observe.snapshot import BackendStatus
from hicache_core.storage.base import Flushable, StorageBackend
from hicache_core.storage.workers.executor import Worker
from hicache_core.types import Job, Page


@dataclass(slots=True, eq=False)
class Attachment:
    """One open storage backend and the worker that drives it.

    Attributes:
        name: of the backend, for messages.
        backend: with all that stands around it.
        worker: runs jobs on it.
        namespace: prefix of every storage key.
        is_writer: whether this rank writes; of ranks that hold the same bytes one does.
        admission: how much of what storage has is loaded.
        verdict: why the object under a key was refused when it was read last; None if it was not.
        statuses: what is known of each store, the nearest first; no store is asked.
        rejected: objects that were refused when read, by kind.
        manifest: key and page of an object that says what the namespace stands for; None for none.
        before_close: ends what else looks at the backend.
        epoch: number of this attachment, from 1: what ``Node.stored_in`` names.
    """

    name: str
    backend: StorageBackend
    worker: Worker
    namespace: str
    is_writer: bool = True
    admission: Admission = field(default_factory=AlwaysAdmit)
    verdict: Callable[[str], str | None] = lambda _key: None
    statuses: Callable[[], Sequence[BackendStatus]] = tuple
    rejected: Callable[[], Mapping[str, int]] = dict
    manifest: tuple[str, Page] | None = None
    before_close: Callable[[], None] = lambda: None
    epoch: int = 0
    _flushable: Flushable | None = field(init=False)

    def __post_init__(self) -> None:
        self._flushable = self.backend.capability(Flushable)

    def flush(self, timeout_s: float) -> bool:
        """Waits until acknowledged writes have reached every store; False if time ran out."""
        return self._flushable is None or self._flushable.flush(timeout_s)

    def close(self, timeout_s: float) -> list[Job]:
        """Ends the worker and the backend; the jobs that hang in it, and then it stays open."""
        self.before_close()
        abandoned = self.worker.close(timeout_s)
        if not abandoned:
            self.backend.close()
        return abandoned


OpenStorage = Callable[[str, Mapping[str, object]], Attachment]
"""Makes and opens the backend of that name with its own settings; may block; any thread.

Raises:
    HiCacheError: it cannot be used, and nothing of it is left running.
"""


@dataclass(slots=True, eq=False)
class Attaching:
    """A backend that is being opened while requests run.

    Attributes:
        name: of the backend.
        done: it is attached, or failed; the owner thread sets it in ``poll``.
        error: why it failed; empty if it did not.
    """

    name: str
    done: bool = False
    error: str = ""
    _opened: Attachment | None = None
    _ended: bool = False

    def open(self, open_storage: OpenStorage, settings: Mapping[str, object]) -> None:
        """Opens the backend; on whatever thread."""
        try:
            self._opened = open_storage(self.name, settings)
        except HiCacheError as error:
            self.error = str(error)
        finally:
            self._ended = True

    def fail(self, error: RuntimeError) -> None:
        """It could not even be tried."""
        self.error, self._ended = str(error), True
