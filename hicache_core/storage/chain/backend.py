"""Several backends as one: L3, L4, ..., the nearest first."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    BreakerOpen,
    ConfigError,
)
from hicache_core.storage.answers import yes_at
from hicache_core.storage.base import BackendConfig, Buffer, Flushable, StorageBackend
from hicache_core.storage.chain.capabilities import ADAPTERS, Link
from hicache_core.storage.chain.config import ChainConfig
from hicache_core.storage.chain.copier import Copier
from hicache_core.storage.workers.executor import Worker
from hicache_core.types import BackendContext, Page

C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")

MakeWorker: TypeAlias = Callable[[StorageBackend, int], Worker]
"""Makes the worker that stores copies in one link. Called with the link's backend and with the
maximum number of bytes that may wait."""


@dataclass
class _Copiers:
    """The copiers of one link: for pages that were written, and for pages read from lower links."""

    behind: Copier | None = None
    promote: Copier | None = None

    def all(self) -> list[Copier]:
        return [copier for copier in (self.behind, self.promote) if copier is not None]


class ChainBackend(StorageBackend):
    """Reads from the nearest link that has a page, and writes to all of them.

    - **Reads.** A page is present if any link has it. ``batch_get`` reads leading pages from the
      first link as far as it has them, the following ones from the next link, and so on.
      ``get_each`` asks each link once, for the pages that the links before it lack. With
      ``promote``, pages found in a lower link are copied to the links above in the background.
    - **Writes, through.** All links are written one after the other. A page counts as stored when
      every link that can answer has it; at least one must answer.
    - **Writes, behind.** The first link that can answer is written. The links below it get copies
      later; ``flush`` waits for them.
    - **Links that are only read** are neither written, nor promoted to, nor removed from.
    - **Failed links.** A link that raises an ``OSError`` (every ``BackendError`` is one) is skipped
      for the rest of that call. If no link can answer, the error is raised. A link that hangs
      blocks only the current call: its breaker opens, and the next call skips it. Pages of a call
      that has not returned are never passed to another link.

    ``get`` and ``set`` handle one object each; they neither promote nor write behind. ``delete``
    and ``clear`` first wait up to ``settle_s`` for pending copies, and raise if any link fails.

    Threads: as every backend. Copies are stored by workers that live from ``open`` to ``close``.
    """

    name: ClassVar[str] = "chain"
    Config: ClassVar[type[BackendConfig]] = ChainConfig

    def __init__(
        self,
        config: ChainConfig,
        context: BackendContext,
        links: Sequence[Link],
        make_worker: MakeWorker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes a chain of backends that are guarded and sealed and not open yet.

        Args:
            config: how to write and whether to promote; ``config.links`` is not used.
            context: what the chain may know about the cache.
            links: the nearest first, with different names.
            make_worker: makes the workers for copies; called in ``open``.
            clock: seconds; only differences count.

        Raises:
            ConfigError: there is no link, or two have the same name.
        """
        super().__init__(config, context)
        names = [link.name for link in links]
        if not links or len(set(names)) < len(names):
            raise ConfigError(f"a chain needs links, all with different names; found {names}")
        self.links = tuple(links)
        self._written = tuple(link for link in links if not link.read_only)
        self.chain_config = config
        self._make_worker = make_worker
        self._clock = clock
        self._copiers: dict[str, _Copiers] = {}

    def open(self) -> None:
        with contextlib.ExitStack() as undo:
            for link in self.links:
                link.backend.open()
                undo.callback(link.backend.close)
            undo.pop_all()
        if self._copiers:  # a second call: keep the copiers that run
            return
        config = self.chain_config
        self._copiers = {link.name: _Copiers() for link in self.links}
        for link in self._written:
            copiers = self._copiers[link.name]
            if config.write == "behind" and link is not self._written[0]:
                copiers.behind = self._copier(link, config.max_behind_nbytes)
            if config.promote and link is not self.links[-1]:
                copiers.promote = self._copier(link, config.max_promote_nbytes)

    def close(self) -> None:
        """Closes the links, except those in which a copy hangs: they stay open, with a warning."""
        end_s = self._clock() + self.chain_config.settle_s
        with contextlib.ExitStack() as stack:
            for link in self.links:
                copiers = self._copiers[link.name].all() if self._copiers else []
                ended = [copier.close(max(0.0, end_s - self._clock())) for copier in copiers]
                if all(ended):
                    stack.callback(link.backend.close)

    def get(self, key: str) -> Buffer | None:
        def get_from(link: Link) -> Buffer | None:
            return link.backend.get(key)

        call = _Call("get")
        for link in self.links:
            value = call.ask(link, get_from)
            if value is not None:
                return value
        call.raise_if_nobody_answered(self.links)
        return None

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def set(self, key: str, value: Buffer) -> None:
        full: list[BackendFull] = []

        def set_to(link: Link) -> None:
            try:
                link.backend.set(key, value)
            except BackendFull as exc:
                full.append(exc)

        call = _Call("set")
        for link in self._written:
            call.ask(link, set_to)
        call.raise_if_nobody_answered(self._written)
        self._check_written(f"{key} is not stored")
        if full:
            raise full[0]

    def delete(self, keys: Sequence[str]) -> None:
        self.settle(keys)
        unable: list[NotImplementedError] = []

        def delete_from(link: Link) -> None:
            try:
                link.backend.delete(keys)
            except NotImplementedError as exc:
                unable.append(exc)

        call = _Call("delete")
        for link in self._written:
            call.ask(link, delete_from)
        call.raise_if_any_failed()
        self._check_written("nothing is removed")
        if unable:
            raise unable[0]

    def batch_exists(self, keys: Sequence[str]) -> int:
        def count(link: Link, start: int) -> int:
            return link.backend.batch_exists(keys[start:])

        return self._leading("exists", len(keys), count)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        read: list[tuple[Link, int, int]] = []

        def fill(link: Link, start: int) -> int:
            n = link.backend.batch_get(keys[start:], pages[start:])
            read.append((link, start, start + n))
            return n

        n_filled = self._leading("get", len(keys), fill)
        for link, start, stop in read:
            if start < stop:
                self._promote(link, keys[start:stop], pages[start:stop])
        return n_filled

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        def store(link: Link) -> int:
            return link.backend.batch_set(keys, pages)

        behind = self.chain_config.write == "behind"
        call, n_stored = _Call("set"), len(keys) if self._written else 0
        for n, link in enumerate(self._written):
            n_here = call.ask(link, store)
            if n_here is not None:
                n_stored = min(n_stored, n_here)
                if behind:
                    self._write_behind(self._written[n + 1 :], keys, pages)
                    break
        call.raise_if_nobody_answered(self._written)
        return n_stored

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        def ask(link: Link, places: Sequence[int]) -> Sequence[bool]:
            return link.backend.exists_each([keys[n] for n in places])

        found = self._share_out("exists", len(keys), ask)
        return yes_at((n for _, places in found for n in places), len(keys))

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        def fill(link: Link, places: Sequence[int]) -> Sequence[bool]:
            return link.backend.get_each([keys[n] for n in places], [pages[n] for n in places])

        read = self._share_out("get", len(keys), fill)
        for link, places in read:
            if places:
                self._promote(link, [keys[n] for n in places], [pages[n] for n in places])
        return yes_at((n for _, places in read for n in places), len(keys))

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        def store(link: Link) -> Sequence[bool]:
            return link.backend.set_each(keys, pages)

        behind = self.chain_config.write == "behind"
        call, stored = _Call("set"), [bool(self._written)] * len(keys)
        for n, link in enumerate(self._written):
            here = call.ask(link, store)
            if here is not None:
                stored = [so_far and now for so_far, now in zip(stored, here, strict=True)]
                if behind:
                    self._write_behind(self._written[n + 1 :], keys, pages)
                    break
        call.raise_if_nobody_answered(self._written)
        return stored

    def bounds_calls(self) -> bool:
        return all(link.backend.bounds_calls() for link in self.links)

    def capability(self, kind: type[C]) -> C | None:
        """See ``StorageBackend``; a chain has every capability that one of its links has."""
        own = super().capability(kind)
        if own is not None or kind not in ADAPTERS:
            return own
        asked = ((link.name, link.backend.capability(kind)) for link in self.links)
        able = {name: found for name, found in asked if found is not None}
        return cast(C, ADAPTERS[kind](self, able)) if able else None

    def flush(self, timeout_s: float) -> bool:
        """Blocks until every link has what was written, for at most ``timeout_s``.

        Returns:
            False if the time ran out, or if a copy was dropped or could not be stored since the
            last call.
        """
        end_s = self._clock() + timeout_s
        behind = [c.behind for c in self._copiers.values() if c.behind is not None]
        done = [copier.settle(max(0.0, end_s - self._clock())) for copier in behind]
        done += [copier.take_losses() == 0 for copier in behind]
        for link in self.links:
            flushable = link.backend.capability(Flushable)
            if flushable is not None:
                done.append(flushable.flush(max(0.0, end_s - self._clock())))
        return all(done)

    def settle(self, keys: Sequence[str] | None = None) -> None:
        """Waits up to ``settle_s`` for pending copies of ``keys``, or for all if None."""
        end_s = self._clock() + self.chain_config.settle_s
        for copier in self._all_copiers():
            copier.settle(max(0.0, end_s - self._clock()), keys)

    def copy_counts(self) -> dict[str, float]:
        """Returns pages and bytes of copies for each link: behind, promoted, dropped, in flight."""
        counts: dict[str, float] = {}
        for name, copiers in self._copiers.items():
            for what, copier in (("behind", copiers.behind), ("promoted", copiers.promote)):
                if copier is not None:
                    n_copied, n_dropped = copier.counts
                    counts[f"{name}_{what}_pages"] = n_copied
                    counts[f"{name}_{what}_dropped_pages"] = n_dropped
                    counts[f"{name}_{what}_nbytes_in_flight"] = copier.nbytes_in_flight
        return counts

    def _check_written(self, what: str) -> None:
        if not self._written:
            raise BackendDenied(f"chain: all links are read-only; {what}")

    def _copier(self, link: Link, max_nbytes: int) -> Copier:
        worker = self._make_worker(link.backend, max_nbytes)
        return Copier(link.backend, worker, max_nbytes, self._clock)

    def _all_copiers(self) -> list[Copier]:
        return [copier for copiers in self._copiers.values() for copier in copiers.all()]

    def _leading(self, operation: str, n_keys: int, advance: Callable[[Link, int], int]) -> int:
        """Returns how many leading keys the links cover together.

            keys      0 1 2 3 4 5 6
            link one  x x . . . x .     2, then at 5 again
            link two  . . x x x . .     from 2 on, 3
            together  x x x x x x .     6: there both miss

        Args:
            operation: its name, for messages.
            n_keys: number of keys.
            advance: called with a link and an index; returns how many keys the link has from that
                index on, without a gap.
        """
        call, start = _Call(operation), 0
        lacking: set[str] = set()  # links that do not have the key at start
        while start < n_keys:
            link = next((x for x in self.links if x.name not in lacking | call.failed), None)
            if link is None:
                break
            n = call.ask(link, advance, start)
            if n is not None and not 0 <= n <= n_keys - start:
                raise ValueError(f"{link.name} answered {n} of {n_keys - start} pages")
            if n:
                start += n
                lacking.clear()
            lacking.add(link.name)
        if start == 0:
            call.raise_if_nobody_answered(self.links)
        return start

    def _share_out(
        self,
        operation: str,
        n_keys: int,
        ask: Callable[[Link, Sequence[int]], Sequence[bool]],
    ) -> list[tuple[Link, Sequence[int]]]:
        """Asks each link once, the nearest first, for the keys that those before it lack.

        Args:
            operation: its name, for messages.
            n_keys: number of keys.
            ask: called with a link and the places of the keys; answers for each of them.

        Returns:
            The links that answered, and the places of the keys that each has.
        """
        call, left = _Call(operation), list(range(n_keys))
        found: list[tuple[Link, Sequence[int]]] = []
        for link in self.links if left else ():
            answers = call.ask(link, ask, left)
            if answers is None:
                continue
            if len(answers) != len(left):
                raise ValueError(f"{link.name} answered for {len(answers)} of {len(left)} pages")
            found.append((link, list(itertools.compress(left, answers))))
            left = [n for n, is_here in zip(left, answers, strict=True) if not is_here]
            if not left:
                break
        if len(left) == n_keys:
            call.raise_if_nobody_answered(self.links)
        return found

    def _promote(self, source: Link, keys: Sequence[str], pages: Sequence[Page]) -> None:
        """Copies pages that were found in ``source`` into the links above it."""
        for link in self.links[: self.links.index(source)]:
            copier = self._copiers[link.name].promote
            if copier is not None:
                copier.offer(keys, pages)

    def _write_behind(
        self, links: Sequence[Link], keys: Sequence[str], pages: Sequence[Page]
    ) -> None:
        for link in links:
            copier = self._copiers[link.name].behind
            if copier is not None:
                copier.offer(keys, pages)


_KINDS = (BreakerOpen, BackendTimeout, BackendDenied, BackendFull, BackendCorrupt)
"""A chain raises one of these if all its links did, otherwise ``BackendUnavailable``."""


class _Call:
    """One call of the chain: the links that could not answer, and why."""

    def __init__(self, operation: str) -> None:
        self._operation = operation
        self._errors: dict[str, OSError] = {}

    @property
    def failed(self) -> set[str]:
        """Names of the links that could not answer."""
        return set(self._errors)

    def ask(
        self,
        link: Link,
        function: Callable[Concatenate[Link, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T | None:
        """Returns ``function(link, ...)``; None if the link could not answer."""
        try:
            return function(link, *args, **kwargs)
        except OSError as exc:
            self._errors[link.name] = exc
            return None

    def raise_if_nobody_answered(self, links: Sequence[Link]) -> None:
        """Raises if every link failed; see ``raise_if_any_failed``."""
        if len(self._errors) == len(links):
            self.raise_if_any_failed()

    def raise_if_any_failed(self) -> None:
        """Raises the errors of all links in one message, as their class if it is the same."""
        if not self._errors:
            return
        errors = list(self._errors.values())
        alike = (kind for kind in _KINDS if all(isinstance(exc, kind) for exc in errors))
        kind = next(alike, BackendUnavailable)
        texts = (f"{name}: {type(e).__name__}: {e}" for name, e in self._errors.items())
        message = f"chain: {self._operation} failed on {'; '.join(texts)}"
        raise kind(message) from errors[0]
