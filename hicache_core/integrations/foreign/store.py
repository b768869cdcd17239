"""An open backend for an engine that has a cache of its own: its keys, memory and threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hicache_core.integrations.foreign.answer import Answer, Kind, OnDone, Request
from hicache_core.integrations.foreign.calls import Calls, tell
from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.integrations.foreign.staging import StagingAreas
from hicache_core.integrations.foreign.stats import Counter, StoreStats
from hicache_core.observe.snapshot import BackendStatus
from hicache_core.storage.base import Clearable, StorageBackend
from hicache_core.types import Page

MAX_DESCRIBED = 4096

__all__ = ["Answer", "ForeignStore", "OnDone", "Watch"]


@dataclass(frozen=True, slots=True)
class Watch:
    """What is known of the stores, without asking them.

    Attributes:
        statuses: returns what the guard of each store knows, the nearest store first.
        rejected: returns how many objects were refused at a read, by kind.
        verdict: returns why the object under a key was refused at its last read; None if not.
    """

    statuses: Callable[[], Sequence[BackendStatus]]
    rejected: Callable[[], Mapping[str, int]]
    verdict: Callable[[str], str | None]


class ForeignStore:
    """Runs an engine's questions, reads and writes on a backend with seal and guard.

    Pages are the engine's own memory: sequences of writable memoryviews of format ``B``, without a
    header. Nothing of them is touched after a call has returned, or after its ``on_done`` was
    called. A store that fails, hangs or has damaged pages is an answer, never an exception.

    After a read, a page that the answer is yes for holds verified bytes. Any other page holds what
    it held before, or zeros, or the verified bytes of a read that came too late for the answer.

    Nothing waits for ``close``: what a write has answered yes for is stored. In a chain that writes
    behind, it is stored in the first store that answers.

    Threads: all methods may be called from any thread, several at the same time.
    """

    def __init__(
        self,
        backend: StorageBackend,
        calls: Calls,
        watch: Watch,
        *,
        staging: StagingAreas | None = None,
        is_writer: bool = True,
    ) -> None:
        """Made by ``open_store``.

        Args:
            backend: open: seal and guard, perhaps a chain of them.
            calls: run on it.
            watch: what is known of it.
            staging: the memory of ``calls``, if they have any.
            is_writer: whether this process stores; if not, every write answers yes at once.
        """
        self.backend = backend
        self.statuses = watch.statuses
        self.rejected = watch.rejected
        self.verdict = watch.verdict
        self.is_writer = is_writer
        self._calls = calls
        self._staging = staging
        self._counter = Counter()
        self._lock = threading.Lock()
        self._described: OrderedDict[str, ForeignNamespace] = OrderedDict()  # last used last
        self._owed: dict[str, ForeignNamespace] = {}  # of these, those that the store does not have
        self._closed = False

    def describe(self, namespace: ForeignNamespace) -> str:
        """Leaves the manifest of a namespace in the store, in the background, once.

        If the store cannot take it now, it gets it with a later write. Of more than
        ``MAX_DESCRIBED`` namespaces the least recently described are forgotten.

        Returns:
            ``namespace.digest``.
        """
        digest = namespace.digest
        with self._lock:
            if not self.is_writer:
                return digest
            if digest in self._described:
                self._described.move_to_end(digest)
                return digest
            self._described[digest] = namespace
            if len(self._described) > MAX_DESCRIBED:
                forgotten, _ = self._described.popitem(last=False)
                self._owed.pop(forgotten, None)
        self._leave_manifest(namespace)
        return digest

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces the memory that pages lie in, for transports that must know it.

        Raises:
            BackendError: the transport does not take it.
        """
        self._calls.register_memory(buffers)

    def exists(self, keys: Sequence[str]) -> Answer:
        """Returns which keys are present. Blocks."""
        return self._run(Request(Kind.EXISTS, keys))

    def read(self, keys: Sequence[str], pages: Sequence[Page]) -> Answer:
        """Reads and verifies pages. Blocks."""
        return self._run(Request.of(Kind.READ, keys, pages))

    def write(self, keys: Sequence[str], pages: Sequence[Page]) -> Answer:
        """Stores pages. Blocks."""
        if not self.is_writer:
            return Answer([True] * len(keys))
        self._leave_owed_manifests()
        return self._run(Request.of(Kind.WRITE, keys, pages))

    def submit_exists(self, keys: Sequence[str], on_done: OnDone) -> None:
        """As ``exists``, in the background."""
        self._submit(Request(Kind.EXISTS, keys), on_done)

    def submit_read(self, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone) -> None:
        """As ``read``, in the background.

        Args:
            keys: one for each page.
            pages: where to read to; the caller leaves them alone until ``on_done`` is called.
            on_done: gets the answer.
        """
        self._submit(Request.of(Kind.READ, keys, pages), on_done)

    def submit_write(self, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone) -> None:
        """As ``write``, in the background. Answers no at once if too many bytes wait already.

        Args:
            keys: one for each page.
            pages: what to store; the caller leaves them alone until ``on_done`` is called.
            on_done: gets the answer.
        """
        if not self.is_writer:
            tell(on_done, Answer([True] * len(keys)))
            return
        self._leave_owed_manifests()
        self._submit(Request.of(Kind.WRITE, keys, pages), on_done)

    @property
    def n_in_flight(self) -> int:
        """Calls in the background that have not called back."""
        return self._calls.n_in_flight

    def stats(self) -> StoreStats:
        """Returns counts since the store was opened, for an engine's metrics."""
        staging = self._staging
        return StoreStats(
            exists=self._counter.stats(Kind.EXISTS),
            read=self._counter.stats(Kind.READ),
            write=self._counter.stats(Kind.WRITE),
            refused=self.rejected(),
            n_in_flight=self.n_in_flight,
            n_without_staging=0 if staging is None else staging.n_refused,
            staging_nbytes=None if staging is None else staging.held_nbytes,
            backends=self.statuses(),
        )

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; returns how many there were.

        Raises:
            BackendError: the store cannot answer.
            NotImplementedError: the backend cannot be cleared.
        """
        clearable = self.backend.capability(Clearable)
        if clearable is None:
            raise NotImplementedError(f"backend {self.backend.name!r} cannot be cleared")
        n_removed = clearable.clear(prefix)
        with self._lock:
            for digest, namespace in self._described.items():
                if f"{digest}/".startswith(prefix):
                    self._owed[digest] = namespace  # its manifest has gone, too
        return n_removed

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends running calls within ``timeout_s``, then closes the backend, unless one hangs.

        Calls that were answered already cost no time. Later calls are answered no.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._calls.close(timeout_s):
            self.backend.close()

    def _run(self, request: Request) -> Answer:
        if not request.keys:
            return Answer([])
        answer = self._calls.run(request)
        self._counter.add(request, answer)
        return answer

    def _submit(self, request: Request, on_done: OnDone) -> None:
        if not request.keys:
            tell(on_done, Answer([]))
        else:
            self._calls.submit(request, self._counter.counting(request, on_done))

    def _leave_manifest(self, namespace: ForeignNamespace) -> None:
        """Stores a manifest in the background; notes it as owed if the store does not take it."""
        key, payload = namespace.manifest

        def on_done(answer: Answer) -> None:
            with self._lock:
                if not answer.mask[0] and namespace.digest in self._described:
                    self._owed[namespace.digest] = namespace

        self._calls.submit(Request.of(Kind.WRITE, [key], [(payload,)]), on_done)

    def _leave_owed_manifests(self) -> None:
        if not self._owed:
            return
        with self._lock:
            owed, self._owed = self._owed, {}
        for namespace in owed.values():
            self._leave_manifest(namespace)
