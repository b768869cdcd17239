"""The smallest world of the storage tests: backends on a directory of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.types import BackendContext


class Clock:
    """Time that a test sets."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_file(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., FileBackend]]:
    """Opens file backends on one directory; closes them at the end."""
    opened: list[FileBackend] = []

    def open_one(**settings: object) -> FileBackend:
        config = FileConfig.model_validate({"path": tmp_path / "store"} | settings)
        backend = FileBackend(config, BackendContext(namespace="0" * 16), clock)
        backend.open()
        opened.append(backend)
        return backend

    yield open_one
    for backend in opened:
        backend.close()


@pytest.fixture
def advance(clock: Clock) -> Callable[[float], None]:
    """Lets seconds pass for the backends of ``open_file``."""

    def pass_(seconds: float) -> None:
        clock.now += seconds

    return pass_
