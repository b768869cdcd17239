"""The store that engines' adapters use: answers per key, in the engine's own memory."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.foreign.store import Answer, ForeignStore

NBYTES = 4096
NAMESPACE = ForeignNamespace("an engine", "1", "name:a model", "page_first", 16, NBYTES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ForeignStore]:
    opened = open_store("file", {"path": str(tmp_path)}, object_nbytes=NBYTES)
    yield opened
    opened.close()


def test_pages_behind_a_gap_are_found_and_read(store: ForeignStore) -> None:
    keys = [NAMESPACE.key(os.urandom(32)) for _ in range(5)]
    pages = [[memoryview(bytearray(os.urandom(NBYTES)))] for _ in keys]
    assert store.write(keys[::2], pages[::2]).mask == [True] * 3
    expected = [True, False, True, False, True]
    assert store.exists(keys).mask == expected
    for way in ("blocking", "in the background"):
        into = [[memoryview(bytearray(NBYTES))] for _ in keys]
        answers: queue.Queue[Answer] = queue.Queue()
        if way == "blocking":
            answers.put(store.read(keys, into))
        else:
            store.submit_read(keys, into, answers.put)
        assert answers.get(timeout=10).mask == expected
        assert [bytes(into[n][0]) == bytes(pages[n][0]) for n in (0, 2, 4)] == [True] * 3


def test_the_engines_version_is_not_part_of_a_key_and_every_other_field_is() -> None:
    def digest(**changed: object) -> str:
        return replace(NAMESPACE, **changed).digest

    assert digest(engine_version="2") == NAMESPACE.digest
    others = {"engine": "b", "model": "b", "layout": "b", "page_size": 1, "object_nbytes": 1}
    changed = [digest(**{name: value}) for name, value in others.items()]
    changed.append(digest(details={"dtype": "bfloat16"}))
    assert len({*changed, NAMESPACE.digest}) == 7
