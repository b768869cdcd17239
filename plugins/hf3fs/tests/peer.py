"""A second process: opens a backend, then does what it reads from stdin, a command a line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hicache_hf3fs.metadata import Wanted

from plugins.hf3fs.tests.helpers import hits, key_of, new_backend, put


def main() -> None:
    """Runs until stdin ends."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    backend = new_backend(Path(arguments.pop("prefix")), **arguments)
    backend.open()

    def reserve(labels: list[str]) -> int:
        """A writer that goes no further."""
        with backend._calls.call() as store:
            wanted = [Wanted(key_of(label), 1000) for label in labels]
            return len(store.metadata.reserve(store.own.name, wanted))

    def churn(name: str, seconds: float) -> int:
        """Stores and reads its own objects and those of the others, as fast as it can."""
        stop_at, n = time.monotonic() + seconds, 0
        while time.monotonic() < stop_at:
            put(backend, [f"{name} {n % 40} {i}" for i in range(4)])
            for other in ("a", "b"):
                hits(backend, [f"{other} {n % 40} {i}" for i in range(4)])
            n += 1
        return n

    commands: dict[str, Any] = {
        "put": lambda labels: put(backend, labels),
        "hits": lambda labels: hits(backend, labels),
        "reserve": reserve,
        "churn": churn,
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *rest = json.loads(line)
        print(json.dumps(commands[command](*rest)), flush=True)
    backend.close()


if __name__ == "__main__":
    main()
