"""The smallest world of the storage tests: backends on a directory of their own, and chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hicache_core.storage.base import StorageBackend
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.chain.capabilities import Link
from hicache_core.storage.chain.config import ChainConfig
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.types import BackendContext
from tests.unit.storage.threads import storage_threads
from tests.unit.storage.virtual import CONTEXT, MakeChain, make_worker


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


@pytest.fixture
def make() -> Iterator[MakeChain]:
    """Opens chains; closes them at the end, when no thread of theirs may be left."""
    chains: list[ChainBackend] = []
    before = storage_threads()

    def make_chain(backends: Sequence[StorageBackend], **settings: object) -> ChainBackend:
        names = ("near", "middle", "far")[: len(backends)]
        config = ChainConfig.model_validate(
            {"links": [{"backend": name} for name in names], "settle_s": 20.0, **settings}
        )
        links = [Link(name, backend) for name, backend in zip(names, backends, strict=True)]
        chain = ChainBackend(config, CONTEXT, links, make_worker)
        chain.open()
        chains.append(chain)
        return chain

    yield make_chain
    for chain in chains:
        chain.close()
    assert storage_threads() <= before
