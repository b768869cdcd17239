"""Rules of opening a store for an engine: what is refused, and what the backend is told."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from hicache_core.build.storage import Composed
from hicache_core.errors import ConfigError, UnknownBackend
from hicache_core.integrations.foreign.opening import open_store, store_on
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import Page
from tests.unit.integrations.foreign_world import (
    NBYTES,
    Unbounded,
    content,
    keys_of,
    memory,
    opened,
    page_of,
    pages_of,
)


def test_a_backend_of_one_process_is_refused_where_several_share_it(tmp_path: Path) -> None:
    link = {"backend": "memory"}
    for name, settings in (
        ("memory", {}),
        ("memory", {"share": "a"}),
        ("chain", {"links": [link, link | {"name": "other"}]}),
    ):
        with pytest.raises(ConfigError, match=f"'{name}' keeps its objects in one process"):
            open_store(name, settings, across_processes=True)
        open_store(name, settings).close()
    file = {"path": str(tmp_path)}
    open_store("file", file, across_processes=True).close()
    links = [link, {"backend": "file", "config": file}]
    open_store("chain", {"links": links}, across_processes=True).close()


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("nosuch", {}, UnknownBackend, "nosuch"),
        ("file", {"path": "/x", "pth": 1}, ConfigError, "pth"),
        ("file", {"path": "/x", "guard": {"opn_s": 1}}, ConfigError, "opn_s"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(
    name: str, settings: Mapping[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_store(name, settings)
    assert "\n" not in str(caught.value)


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        open_store("memory", {}, n_threads=0)
    with pytest.raises(ConfigError, match="at least 1"):
        open_store("memory", {}, staging_nbytes=0)


def test_the_staging_memory_holds_a_page_for_each_thread() -> None:
    nbytes = 200_000
    store = opened(memory(), object_nbytes=nbytes, n_threads=2, staging_nbytes=1)
    pages = [page_of(content(n, nbytes)) for n in range(4)]
    assert store.write(keys_of(range(4)), pages).mask == [True] * 4
    store.close()


def test_a_backend_is_told_the_length_of_the_longest_object(tmp_path: Path) -> None:
    for nbytes, told in ((NBYTES, HEADER_NBYTES + NBYTES), (0, 0)):
        store = open_store("file", {"path": str(tmp_path)}, object_nbytes=nbytes)
        assert store.backend.context.object_nbytes == told
        store.close()


class Registering(BackendWrapper):
    """A transport that must know the memory of every segment, as RDMA must."""

    def __init__(self) -> None:
        super().__init__(memory())
        self.known: list[tuple[int, int]] = []

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        self.known += [self._place(buffer) for buffer in buffers]

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        for page in pages:
            for segment in page:
                start, end = self._place(segment)
                assert any(low <= start and end <= high for low, high in self.known)
        return self.inner.batch_set(keys, pages)

    @staticmethod
    def _place(view: memoryview) -> tuple[int, int]:
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        return start, start + view.nbytes


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "staged"])
def test_a_transport_is_told_of_all_memory_that_it_touches_and_of_no_other(direct: bool) -> None:
    backend = Registering()
    store = opened(backend, direct=direct)
    pools = [memoryview(bytearray(NBYTES)) for _ in range(2)]
    for pool in pools:
        store.register_memory([pool])
    pages: list[Page] = [(pool,) for pool in pools]
    answer = store.write(keys_of(range(2)), pages)
    assert (answer.mask, answer.error) == ([True] * 2, "")
    told = {Registering._place(pool) for pool in pools} & set(backend.known)
    assert len(told) == (2 if direct else 0)
    n_own = 1 if direct else 2  # the headers; or the staging memory of reads and of writes
    assert len(backend.known) == len(told) + n_own
    store.close()


class LateTransfer(Registering):
    """A transfer of an earlier call changes the first page when it is verified already."""

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__()
        self.inner = inner

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        mask = self.inner.get_each(keys, pages)
        pages[0][-1][0] ^= 1
        return mask


def test_a_page_that_a_late_transfer_changes_after_its_check_is_refused_and_wiped() -> None:
    config = GuardConfig()
    seal = SealedBackend(Unbounded(memory()))
    guard = GuardedBackend(seal, config)
    made = Composed(LateTransfer(guard), (guard,), (seal,), config.deadlines)
    store = store_on(made)
    keys = keys_of("ab")
    assert store.write(keys, pages_of("ab")).mask == [True, True]
    into = pages_of("xy")
    assert store.read(keys, into).mask == [False, True]
    assert bytes(b"".join(into[0])) == bytes(NBYTES)
    assert bytes(b"".join(into[1])) == content("b")
    store.close()


def test_a_process_that_does_not_write_says_yes_and_stores_nothing(tmp_path: Path) -> None:
    settings = {"path": str(tmp_path)}
    store = open_store("file", settings, object_nbytes=NBYTES, is_writer=False)
    assert store.write(keys_of("ab"), pages_of("ab")).mask == [True, True]
    assert store.exists(keys_of("ab")).mask == [False, False]
    store.close()
