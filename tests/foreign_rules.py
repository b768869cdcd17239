"""Rules of stores for engines that every backend keeps: one rule a function, on a real store.

``name`` and ``settings`` are as for ``open_store``, in every function.
"""

from __future__ import annotations

import json
import queue
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

from hicache_core.integrations.foreign.store import Answer, ForeignStore
from tests.crash.foreign_writer import NAMESPACES, WAYS, keys_and_pages, opened
from tests.unit.integrations.foreign_world import (
    NAMESPACE,
    PATTERN,
    bytes_in,
    keys_of,
    page_of,
    pages_of,
)

Settings = Mapping[str, object]


class Frozen(Protocol):
    """A server that can be stopped without ending it."""

    def freeze(self) -> None: ...
    def thaw(self) -> None: ...


WAIT_S = 60.0
N_BEHIND = 12
"""So many pages behind the last answer may have been in flight."""


def namespaces_of_several_lengths_share_a_store(name: str, settings: Settings) -> None:
    """Pages of each length are stored, found and read; a key of one is a miss in another."""
    names = range(9)
    with closing(opened(name, settings)) as store:
        keys, pages = keys_and_pages(0, "shared", names)
        for namespace in NAMESPACES:
            store.describe(namespace)
        assert store.write(keys[::2], pages[::2]).mask == [True] * 5
        expected = [n % 2 == 0 for n in names]
        assert store.exists(keys).mask == expected
        into = [page_of(bytes(len(bytes_in(page)))) for page in pages]
        assert store.read(keys, into).mask == expected
        for n in names[::2]:
            assert bytes_in(into[n]) == bytes_in(pages[n])
        for namespace in NAMESPACES[1:]:
            assert store.exists(keys_of([(0, "shared", 0)], namespace)).mask == [False]
    with closing(opened(name, settings)) as another:
        assert another.exists(keys).mask == expected, "what one process stored, the next one has"


def a_page_of_another_length_is_a_miss(name: str, settings: Settings) -> None:
    """Two layouts under one key would be a mistake of an adapter; it is no hit all the same."""
    namespace = replace(NAMESPACE, object_nbytes=0)
    keys = keys_of(range(3), namespace)
    with closing(opened(name, settings)) as store:
        assert store.write(keys, pages_of(range(3), 4096)).mask == [True] * 3
        for nbytes in (4095, 4097, 700):
            assert store.read(keys[:1], [page_of(bytes(nbytes))]).mask == [False]


def killed_writers_leave_what_was_answered_and_no_wrong_page(
    name: str, settings: Settings, *, n_kills: int = 2
) -> int:
    """SIGKILL in the middle of stores: nothing waits for ``close``. Returns the pages answered."""
    rng = random.Random(7)
    n_answered = 0
    for run in range(n_kills):
        told = _killed(name, settings, run, rng.uniform(0.02, 0.3))
        with closing(opened(name, settings)) as store:
            for way in WAYS:
                mine = [answer for answer in told if answer["way"] == way]
                n_answered += _check(store, run, way, mine)
    assert n_answered > 0
    return n_answered


def a_frozen_store_is_answered_in_time_and_touches_nothing(
    name: str, settings: Settings, server: Frozen
) -> None:
    """Reads while ``server`` is frozen are answered; what it sends later reaches no memory."""
    guard = {"open_s": 0.2, "max_open_s": 0.5, "negative_ttl_s": 0.1}
    with closing(opened(name, {**settings, "guard": guard})) as store:
        keys, pages = keys_and_pages(0, "frozen", range(6))
        assert store.write(keys, pages).mask == [True] * 6
        lent = [page_of(bytes(len(bytes_in(page)))) for page in [*pages, *pages]]
        server.freeze()
        try:
            background = queue.Queue[Answer]()
            store.submit_read(keys, lent[6:], background.put)
            answers = [store.read(keys, lent[:6]), background.get(timeout=WAIT_S)]
        finally:
            for page in lent:
                for segment in page:
                    segment[:] = PATTERN * segment.nbytes
            server.thaw()
        for answer in answers:
            assert answer.mask == [False] * 6
            assert answer.error
        deadline = time.monotonic() + WAIT_S
        while not all(store.read(keys, pages).mask):
            assert time.monotonic() < deadline, "the store has not recovered"
            time.sleep(0.1)
        assert not any(bytes_in(page).strip(PATTERN) for page in lent)


def _check(store: ForeignStore, run: int, way: str, told: Sequence[Mapping[str, Any]]) -> int:
    """Reads all that a thread of a killed writer may have stored; how many answers were yes."""
    yes = {answer["first"] + n for answer in told for n, one in enumerate(answer["mask"]) if one}
    end = max((answer["first"] + len(answer["mask"]) for answer in told), default=0)
    keys, pages = keys_and_pages(run, way, range(end + N_BEHIND))
    into = [page_of(bytes(len(bytes_in(page)))) for page in pages]
    mask = store.read(keys, into).mask
    lost = [n for n in yes if not mask[n]]
    assert not lost, f"answered yes, but not there: {lost} of {len(yes)}"
    for page, filled, found in zip(pages, into, mask, strict=True):
        assert not found or bytes_in(filled) == bytes_in(page)
    return len(yes)


def _killed(name: str, settings: Settings, run: int, after_s: float) -> list[dict[str, Any]]:
    """Starts a writer, kills it ``after_s`` its first answer; what it told."""
    command = [sys.executable, "-m", "tests.crash.foreign_writer", name, json.dumps(settings)]
    writer = subprocess.Popen([*command, str(run)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        first = writer.stdout.readline()
        time.sleep(after_s)
    finally:
        writer.send_signal(signal.SIGKILL)
    lines = [first, *writer.stdout]
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL, "the writer ended by itself"
    return [json.loads(line) for line in lines if line.endswith("\n")]
