"""What all workers of one run share: folders, and turns at what one of them should do for all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def shared_folder(
    factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]
) -> Path:
    """The folder ``name`` of this run; ``fill`` gets it empty, in the first worker that asks."""
    with one_at_a_time(factory, name) as root:
        folder, whole = root / name, root / f"{name}.whole"
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a worker that failed has left
            folder.mkdir()
            fill(folder)
            whole.touch()
    return folder


@contextmanager
def one_at_a_time(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Workers that enter with the same name wait for each other; the folder of the whole run."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # then each worker has a folder of its own in the run's
        root = root.parent
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root
