"""A process that stores an engine's pages until it is killed, and tells each answer when it has it.

    python -m tests.crash.foreign_writer NAME SETTINGS SEED

It writes lines of JSON, one an answer: who asked, the number of the first page, and the answer for
each page.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.foreign.store import Answer, ForeignStore
from hicache_core.types import Page
from tests.unit.integrations.foreign_world import NAMESPACE, content, keys_of, page_of

SIZES = (700, 4096, 70_000)
WAYS = ("blocking", "background")
NAMESPACES = [replace(NAMESPACE, object_nbytes=nbytes) for nbytes in SIZES]


def opened(name: str, settings: Mapping[str, object]) -> ForeignStore:
    """The store of the writer and of its reader."""
    return open_store(name, settings, object_nbytes=max(SIZES), n_threads=2)


def keys_and_pages(run: int, way: str, numbers: Sequence[int]) -> tuple[list[str], list[Page]]:
    """What a writer stores as its pages of these numbers: each in the namespace of its length."""
    keys, pages = [], []
    for n in numbers:
        namespace = NAMESPACES[n % len(SIZES)]
        keys += keys_of([(run, way, n)], namespace)
        pages.append(page_of(content((run, way, n), namespace.object_nbytes)))
    return keys, pages


def work(store: ForeignStore, run: int, way: str) -> None:
    """Stores batches for ever."""
    rng = random.Random(f"{run} {way}")
    first = 0
    done = threading.Event()
    while True:
        numbers = range(first, first + rng.randrange(1, 7))
        keys, pages = keys_and_pages(run, way, numbers)

        def tell(answer: Answer, first: int = first) -> None:
            told = {"way": way, "first": first, "mask": list(answer.mask), "error": answer.error}
            os.write(1, (json.dumps(told) + "\n").encode())
            done.set()

        if way == "blocking":
            tell(store.write(keys, pages))
        else:
            done.clear()
            store.submit_write(keys, pages, tell)
            done.wait()
        first = numbers.stop


def main() -> None:
    """Stores until it is killed."""
    name, settings, run = sys.argv[1:]
    store = opened(name, json.loads(settings))
    for namespace in NAMESPACES:
        store.describe(namespace)
    threads = [threading.Thread(target=work, args=(store, int(run), way)) for way in WAYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
