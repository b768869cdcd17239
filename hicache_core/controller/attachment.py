"""A storage backend that is attached, one that is being opened, one that is being cleared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hicache_core.controller.admission import Admission, AlwaysAdmit
from hicache_core.errors import HiCacheError
from hicache_core.observe.snapshot import BackendStatus
from hicache_core.storage.base import Clearable, Flushable, StorageBackend
from hicache_core.storage.workers.executor import Worker
from hicache_core.types import Job, Page

ANY_COUNT = 2**31 - 1
"""What a rank reports for the objects of another rank: the least counts, so the other's does."""


@dataclass(slots=True, eq=False)
class Attachment:
    """One open storage backend and the worker that drives it.

    Attributes:
        name: of the backend, for messages.
        backend: the outermost layer: seal, guard and chain are inside.
        worker: runs jobs on the backend.
        namespace: prefix of the storage keys of full pages.
        is_writer: whether this rank writes; of ranks that hold the same bytes, one does.
        admission: decides how many of the pages that storage has are loaded.
        verdict: why the object under a key was refused at its last read; None if it was not.
        statuses: what is known of each store, the nearest first; asks no store.
        rejected: how many objects were refused at a read, by kind.
        manifests: key and page of objects that say what the namespaces mean.
        before_close: called before the backend is closed.
        epoch: number of this attachment, from 1, which ``Node.stored_in`` names.
        group_namespaces: prefix of the storage keys of each group of layers.
        read_only: whether nothing is stored there.
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
    manifests: Sequence[tuple[str, Page]] = ()
    before_close: Callable[[], None] = lambda: None
    epoch: int = 0
    group_namespaces: tuple[str, ...] = ()
    read_only: bool = False
    _flushable: Flushable | None = field(init=False)

    def __post_init__(self) -> None:
        self._flushable = self.backend.capability(Flushable)

    def flush(self, timeout_s: float) -> bool:
        """Blocks until acknowledged writes have reached every store; False if time ran out."""
        return self._flushable is None or self._flushable.flush(timeout_s)

    def close(self, timeout_s: float) -> list[Job]:
        """Ends the worker within ``timeout_s``, then the backend.

        Returns:
            Jobs that hang in the backend. If there are any, it stays open.
        """
        self.before_close()
        abandoned = self.worker.close(timeout_s)
        if not abandoned:
            self.backend.close()
        return abandoned


OpenStorage = Callable[[str, Mapping[str, object]], Attachment]
"""Makes and opens the backend of a name, with the backend's own settings. May block; any thread.

Raises:
    HiCacheError: the backend cannot be used; nothing of it is left running.
"""


@dataclass(slots=True, eq=False)
class Attaching:
    """A backend that is being opened while requests run.

    Attributes:
        name: of the backend.
        done: whether it is attached or has failed; ``poll`` sets it.
        error: why it failed; empty if it did not.
    """

    name: str
    done: bool = False
    error: str = ""
    _opened: Attachment | None = None
    _ended: bool = False
    _given_up: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, open_storage: OpenStorage, settings: Mapping[str, object]) -> None:
        """Opens the backend, and closes it again if it was given up meanwhile. Any thread."""
        try:
            opened = open_storage(self.name, settings)
            with self._lock:
                if not self._given_up:
                    self._opened = opened
            if self._given_up:
                opened.close(0.0)
        except HiCacheError as error:
            self.error = str(error)
        finally:
            self._ended = True

    def give_up(self) -> Attachment | None:
        """Ends it because the cache is closed.

        Returns:
            The backend if it is open already. If it is not, ``open`` closes it.
        """
        with self._lock:
            self._given_up = True
            opened, self._opened = self._opened, None
        return opened

    def fail(self, error: RuntimeError) -> None:
        """Ends it because no thread could be started."""
        self.error, self._ended = str(error), True


@dataclass(slots=True, eq=False)
class Clearing:
    """The removal of a cache's objects from its store, while requests run.

    Attributes:
        attachment: the backend, and this rank's namespace.
        n_ranks_left: ranks that have not said yet how many objects they removed.
        n_objects: removed by the ranks that have.
        error: why a rank failed; empty if none did.
    """

    attachment: Attachment
    n_ranks_left: int
    n_objects: int = 0
    error: str = ""
    _reported: int = 0
    _ended: bool = False

    @property
    def done(self) -> bool:
        """Whether all ranks are done; changes in ``poll``."""
        return self.n_ranks_left == 0

    @property
    def report(self) -> int | None:
        """One more than this rank removed, 0 if it failed; None while it is at work."""
        return self._reported if self._ended else None

    def run(self) -> None:
        """Removes this rank's objects, unless another rank writes them. Any thread."""
        attachment = self.attachment
        try:
            n_objects = 0
            if attachment.is_writer:
                clearable = attachment.backend.capability(Clearable)
                assert clearable is not None  # who asks to clear has looked
                for namespace in (attachment.namespace, *attachment.group_namespaces):
                    n_objects += clearable.clear(f"{namespace}/")
            self._reported = 1 + n_objects
        except HiCacheError as error:
            self.error = str(error)
        finally:
            self._ended = True

    def fail(self, error: RuntimeError) -> None:
        """Ends it because no thread could be started."""
        self.error, self._ended = str(error), True

    def settle(self, reported: int) -> None:
        """Counts what one rank has ``reported``."""
        self.n_ranks_left -= 1
        self.n_objects += max(0, reported - 1)
        if reported == 0:
            self.error = self.error or "a rank could not; its log says why"
