"""Rules of backends that show each page while it is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.records import Extent, RecordStore
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.storage.visiting import VisitsPages
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import BackendContext

OpenFile = Callable[..., FileBackend]
KEYS = [f"{'0' * 16}/{n:064x}" for n in range(5)]


def pages(n: int, fill: bytes = b"x" * 3000) -> list[list[memoryview]]:
    return [[memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(fill))] for _ in range(n)]


def test_each_page_is_shown_once_and_what_is_stored_already_is_passed_over(
    open_file: OpenFile,
) -> None:
    backend = open_file()
    shown: list[int] = []
    assert backend.batch_set_visiting(KEYS[1:3], pages(2), shown.append) == 2
    assert sorted(shown) == [0, 1]
    shown.clear()
    assert backend.batch_set_visiting(KEYS, pages(5), shown.append) == 5
    assert sorted(shown) == [0, 3, 4]


def test_what_is_written_is_what_the_page_holds_after_the_visit(open_file: OpenFile) -> None:
    backend, page = open_file(), pages(1)

    def leaving(n: int) -> None:
        page[n][1][:4] = b"late"

    assert backend.batch_set_visiting(KEYS[:1], page, leaving) == 1
    assert bytes(backend.get(KEYS[0]) or b"")[HEADER_NBYTES:][:5] == b"latex"


@pytest.mark.parametrize("refused", range(5))
def test_the_count_ends_before_the_first_page_that_is_refused(
    open_file: OpenFile, refused: int
) -> None:
    backend = open_file()
    backend.batch_set(KEYS, pages(5))
    assert backend.batch_get_visiting(KEYS, pages(5), lambda n: n != refused) == refused
    assert backend.batch_exists(KEYS) == 5, "to refuse a page does not remove it"


def test_an_error_of_the_visitor_passes_through_and_leaves_nothing_claimed(
    open_file: OpenFile,
) -> None:
    backend = open_file()

    def fail(n: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        backend.batch_set_visiting(KEYS, pages(5), fail)
    backend.check_integrity()
    assert backend.batch_exists(KEYS) == 0
    held_nbytes = backend.stats()["held_nbytes"]
    assert backend.batch_set(KEYS, pages(5)) == 5
    assert backend.stats()["held_nbytes"] == held_nbytes, "the same space is used"


def test_a_page_overwritten_while_it_was_read_is_a_miss_and_no_damage(
    open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, other = open_file(), open_file()
    sealed = SealedBackend(backend)
    sealed.batch_set(KEYS[:1], pages(1))
    read = RecordStore.read

    def torn_read(self: RecordStore, key: str, page: Any, extent: Extent) -> bool:
        assert read(self, key, page, extent)
        other.delete(KEYS[:1])
        page[1][7:9] = b"??"
        return True

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "read", torn_read)
        assert sealed.batch_get(KEYS[:1], pages(1)) == 0
    stats = sealed.stats()
    assert [name for name in stats if name.startswith("sealed_") and stats[name]] == []


def test_a_wrapper_in_between_is_not_passed_over() -> None:
    assert issubclass(FileBackend, VisitsPages)
    inner = MemoryBackend(MemoryConfig(), BackendContext(namespace="0" * 16))
    assert BackendWrapper(inner).capability(VisitsPages) is None


def test_a_wrapper_around_the_file_backend_sees_every_page(open_file: OpenFile) -> None:
    wrapper = BackendWrapper(open_file())
    assert wrapper.inner.capability(VisitsPages) is wrapper.inner
    assert wrapper.capability(VisitsPages) is None
    sealed = SealedBackend(wrapper)
    assert sealed.batch_set(KEYS, pages(5)) == 5
    into = pages(5, bytes(3000))
    assert sealed.batch_get(KEYS, into) == 5
    assert [bytes(page[1]) for page in into] == [b"x" * 3000] * 5
