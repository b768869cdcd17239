"""Rules about a store that is gone, stuck, back or full, and about what must not be seen."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from hicache_core.config.redact import MASK
from hicache_core.errors import BackendError, BackendFull, BackendTimeout, BackendUnavailable
from hicache_core.storage.base import Diagnosable, HasStats, StorageBackend
from hicache_core.storage.segments import join
from hicache_core.testing.bounded import Call, bounded
from hicache_core.testing.content import content, scribble
from hicache_core.testing.features import Feature
from hicache_core.testing.harness import Harness, RuleBroken, expect, is_hit, put_each
from hicache_core.testing.rules.rule import RuleBook
from hicache_core.testing.secret_settings import secrets_in

_book = RuleBook("get_counts_leading", "re_put", "set_only_reads", "set_each_stores_all")
rule = _book.rule
RULES = _book.rules

_PAGE = (64, 4032)
_NBYTES = 4096
_LOST = (BackendUnavailable, BackendTimeout)
_A_WHILE_S = 0.1


@contextlib.contextmanager
def _killed(h: Harness) -> Iterator[None]:
    """The server is dead inside, and back afterwards."""
    h.control.kill()
    try:
        yield
    finally:
        h.control.restart()


@contextlib.contextmanager
def _frozen(h: Harness) -> Iterator[None]:
    """The server is frozen inside, and thawed afterwards."""
    h.control.freeze()
    try:
        yield
    finally:
        h.control.thaw()


def _calls(h: Harness, backend: StorageBackend, key: str) -> Mapping[str, Callable[[], object]]:
    """Each method that asks the store something, by its name."""
    return {
        "get": lambda: backend.get(key),
        "exists": lambda: backend.exists(key),
        "set": lambda: backend.set(key, content(key, _NBYTES)),
        "batch_exists": lambda: backend.batch_exists([key, key]),
        "batch_get": lambda: backend.batch_get([key, key], [h.blank(_PAGE), h.blank(_PAGE)]),
        "batch_set": lambda: backend.batch_set([key], [h.filled(key, _PAGE)]),
        "exists_each": lambda: backend.exists_each([key, key]),
        "get_each": lambda: backend.get_each([key, key], [h.blank(_PAGE), h.blank(_PAGE)]),
        "set_each": lambda: backend.set_each([key], [h.filled(key, _PAGE)]),
    }


def _expect_lost(h: Harness, name: str, call: Callable[[], object], state: str) -> None:
    """``call`` raises one of the two errors of a lost store, in bounded time."""
    try:
        answer = bounded(call, h.settings.answer_s, f"{name}, with the server {state},")
    except _LOST:
        return
    raise RuleBroken(
        f"{name}, with the server {state}, answers {answer!r:.80};"
        " it should raise BackendUnavailable or BackendTimeout"
    )


def _expect_recovery(h: Harness, backend: StorageBackend, key: str, state: str) -> None:
    """``backend`` stores and finds again within ``KitSettings.recover_s``."""
    stop_at = time.monotonic() + h.settings.recover_s
    last = "misses what it has just stored"
    while time.monotonic() < stop_at:
        try:
            backend.set(key, content(key, _NBYTES))
            if is_hit(backend, key, _NBYTES):
                return
        except BackendError as error:
            last = f"raises {type(error).__name__}: {error}"
        time.sleep(0.02)
    raise RuleBroken(
        f"{h.settings.recover_s:g} s after the server was {state}, the same instance still {last}"
    )


@rule(
    "While the server is dead, every call soon raises BackendUnavailable or BackendTimeout.",
    requires=Feature.CONTROL,
    patience=3,
)
def dead_server(h: Harness) -> None:
    (key,) = h.keys(1)
    h.put(h.backend, [key], _PAGE)
    with _killed(h):
        for name, call in _calls(h, h.backend, key).items():
            _expect_lost(h, name, call, "dead")


@rule(
    "While the server is dead, open() soon raises BackendUnavailable or BackendTimeout, and so "
    "does check_reachable() if the backend has one.",
    requires=Feature.CONTROL,
)
def open_without_server(h: Harness) -> None:
    recipe = h.target.recipe
    with _killed(h):
        if recipe.backend_class.check_reachable is not StorageBackend.check_reachable:
            _expect_lost(h, "check_reachable", recipe.make().check_reachable, "dead")
        backend = recipe.make()
        try:
            _expect_lost(h, "open", backend.open, "dead")
        finally:
            backend.close()


@rule(
    "The same instance works again after a restart of the server.",
    requires=Feature.CONTROL,
    needs=("dead_server",),
)
def restarted_server(h: Harness) -> None:
    keys = h.keys(2)
    h.put(h.backend, keys[:1], _PAGE)
    with _killed(h):
        for _ in range(3):  # the first finds a broken connection, the next ones none at all
            with contextlib.suppress(*_LOST):
                h.backend.get(keys[0])
    _expect_recovery(h, h.backend, keys[1], "restarted")


@rule(
    "While the server is frozen, every call soon raises BackendUnavailable or BackendTimeout.",
    requires=Feature.CONTROL,
    patience=3,
)
def frozen_server(h: Harness) -> None:
    (key,) = h.keys(1)
    h.put(h.backend, [key], _PAGE)
    with _frozen(h):
        for name, call in _calls(h, h.backend, key).items():
            _expect_lost(h, name, call, "frozen")


@rule(
    "Once the server continues, late answers are not taken for answers to later calls.",
    requires=Feature.CONTROL,
    needs=("frozen_server",),
)
def thawed_server(h: Harness) -> None:
    backend, keys = h.backend, h.keys(6)
    put_each(backend, keys, _NBYTES)
    with _frozen(h):
        for key in keys[:3]:
            with contextlib.suppress(*_LOST):
                backend.get(key)
    _expect_recovery(h, backend, keys[5], "thawed")
    for key in [*keys, *h.keys(2, "absent"), *keys]:
        present = is_hit(backend, key, _NBYTES)
        expect(present == (key in keys), f"after the server was thawed, get answers {present}")


@rule(
    "Nothing writes to a page after batch_get or get_each has raised.",
    requires=Feature.CONTROL,
    needs=("thawed_server",),
)
def page_left_alone_after_error(h: Harness) -> None:
    keys = h.keys(2)
    h.put(h.backend, keys, _PAGE)
    pages = [h.blank(_PAGE) for _ in range(4)]
    with _frozen(h):
        for call, its_pages in (
            (h.backend.batch_get, pages[:2]),
            (h.backend.get_each, pages[2:]),
        ):
            with contextlib.suppress(*_LOST):
                call(keys, its_pages)
    for page in pages:
        scribble(page)
    before = [join(page) for page in pages]
    _expect_recovery(h, h.backend, keys[0], "thawed")
    time.sleep(_A_WHILE_S)
    for n, page in enumerate(pages):
        call_name = "batch_get" if n < 2 else "get_each"
        expect(before[n] == join(page), f"{call_name} raised, and its page changed later")


@rule(
    "A server that dies during batches causes errors and short counts, never wrong bytes.",
    requires=Feature.CONTROL,
    needs=("restarted_server",),
    patience=3,
)
def killed_in_mid_batch(h: Harness) -> None:
    _disturb(h, _killed(h))


@rule(
    "A server that freezes during batches causes errors, never wrong bytes.",
    requires=Feature.CONTROL,
    needs=("page_left_alone_after_error",),
    patience=3,
)
def frozen_in_mid_batch(h: Harness) -> None:
    _disturb(h, _frozen(h))


def _disturb(h: Harness, disturbance: contextlib.AbstractContextManager[None]) -> None:
    """Reads and writes batches in one thread while the server goes away and comes back."""
    backend = h.backend
    keys = h.keys(16)
    nbytes = h.nbytes(h.settings.race_nbytes)
    shape = (64, nbytes - 64)
    pages = [h.filled(key, shape) for key in keys]
    backend.batch_set(keys, pages)
    stop, lost = threading.Event(), threading.Semaphore(0)

    def use() -> None:
        while not stop.is_set():
            try:
                backend.batch_set(keys, pages)
                h.leading_hits(backend, keys, shape)
                h.each_hits(backend, keys, shape)
            except _LOST:
                with contextlib.suppress(*_LOST):
                    h.leading_hits(backend, keys, shape)
                lost.release()

    user = Call(use)
    try:
        time.sleep(_A_WHILE_S)
        with disturbance:
            lost.acquire(timeout=h.settings.answer_s)
    finally:
        stop.set()
    user.result(2 * h.settings.answer_s, "a batch, while the server was away,")
    _expect_recovery(h, backend, h.keys(1, "recovery")[0], "back")
    h.leading_hits(backend, keys, shape)


@rule(
    "A full store ends batch_set's count and makes set raise BackendFull; the counted "
    "pages are stored.",
    requires=Feature.SMALL_STORE,
    patience=2,
)
def full_store(h: Harness) -> None:
    backend, nbytes = h.another(h.target.small), h.nbytes(h.settings.race_nbytes)
    shape = (64, nbytes - 64)
    for n in range(h.settings.full_nbytes // (8 * nbytes)):
        keys = h.keys(8, f"batch {n}")
        n_stored = backend.batch_set(keys, [h.filled(key, shape) for key in keys])
        n_filled = h.leading_hits(backend, keys[:n_stored], shape)
        if n_stored < len(keys):
            expect(
                n_filled == n_stored,
                f"batch_set into a full store counts {n_stored}, but {n_filled} pages are there",
            )
            with contextlib.suppress(BackendFull):
                backend.set(keys[-1], content(keys[-1], nbytes))
                expect(is_hit(backend, keys[-1], nbytes), "set into a full store kept nothing")
            return
    # A store that evicts is never full: the newest object is there.
    expect(is_hit(backend, keys[-1], nbytes), "the store dropped a write and did not say so")


class _Listener(logging.Handler):
    """Keeps what is logged, as text."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@rule(
    "No secret of the settings appears in a log, repr, error, statistic or finding.",
    requires=Feature.SECRETS,
)
def secrets_stay_hidden(h: Harness) -> None:
    listener, root = _Listener(), logging.getLogger()
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    try:
        lines = [*_shown_by(h), *listener.lines]
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    hidden = secrets_in(h.target.recipe.settings)
    for line in lines:
        seen = [secret for secret in hidden if secret in line]
        expect(not seen, f"{len(seen)} secrets are seen in {seen and _without(seen, line)!r:.200}")


def _without(secrets: list[str], line: str) -> str:
    for secret in secrets:
        line = line.replace(secret, MASK)
    return line


def _shown_by(h: Harness) -> list[str]:
    """What an instance shows of itself."""
    keys = h.keys(2)
    backend = h.backend
    h.put(backend, keys, _PAGE)
    shown = [repr(backend), str(backend), repr(backend.config), str(backend.config)]
    counts, diagnosable = backend.capability(HasStats), backend.capability(Diagnosable)
    if counts is not None:
        shown.append(str(dict(counts.stats())))
    if diagnosable is not None:
        shown += [finding.message for finding in diagnosable.diagnose()]
    return shown
