"""Rules of the memory backend."""

from __future__ import annotations

import gc

import pytest
from pydantic import ValidationError

from hicache_core.errors import BackendFull, UseAfterClose
from hicache_core.storage.base import Clearable, HasStats, Listable
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext

CONTEXT = BackendContext(namespace="0" * 16)


class Clock:
    """Time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock | None = None, **settings: object) -> MemoryBackend:
    config = MemoryConfig.model_validate(settings)
    backend = MemoryBackend(config, CONTEXT, clock or Clock())
    backend.open()
    return backend


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


def test_a_page_comes_back_as_it_was_stored() -> None:
    backend = opened()
    assert backend.batch_set(["a", "b"], [views(b"12", b"345"), views(b"", b"6")]) == 2
    pages = [views(b"..", b"..."), views(b"", b".")]
    assert backend.batch_get(["a", "b"], pages) == 2
    assert [b"".join(page) for page in pages] == [b"12345", b"6"]
    assert backend.get("c") is None


@pytest.mark.parametrize("hole", range(4))
def test_counts_end_at_the_first_hole(hole: int) -> None:
    backend = opened()
    keys = [f"k{n}" for n in range(4)]
    for n, key in enumerate(keys):
        if n != hole:
            backend.set(key, b"x")
    assert backend.batch_exists(keys) == hole
    assert backend.batch_get(keys, [views(b".") for _ in keys]) == hole


def test_answers_for_each_key_go_on_behind_gaps() -> None:
    backend = opened()
    keys = [f"k{n}" for n in range(5)]
    for n in (1, 2, 4):
        backend.set(keys[n], b"x" * n)
    assert list(backend.exists_each(keys)) == [False, True, True, False, True]
    pages = [views(b"."), views(b"."), views(b"."), views(b"."), views(b"..", b"..")]
    assert list(backend.get_each(keys, pages)) == [False, True, False, False, True]
    assert [b"".join(page) for page in pages] == [b".", b"x", b".", b".", b"xxxx"]
    assert backend.bounds_calls()


def test_a_page_that_makes_room_for_a_later_one_is_not_stored() -> None:
    backend = opened(max_nbytes=4)
    pages = [views(b"12"), views(b"12345"), views(b"34"), views(b"56")]
    assert list(backend.set_each(["a", "b", "c", "d"], pages)) == [False, False, True, True]
    assert list(backend.exists_each(["a", "b", "c", "d"])) == [False, False, True, True]


def test_pages_that_are_read_together_are_used() -> None:
    backend = opened(max_nbytes=2)
    backend.set("a", b"1")
    backend.set("b", b"2")
    backend.get_each(["x", "a"], [views(b"."), views(b".")])
    backend.set("c", b"3")
    assert list(backend.exists_each(["a", "b", "c"])) == [True, False, True]


def test_a_value_may_be_reused_as_soon_as_set_returns() -> None:
    backend, value = opened(), bytearray(b"abc")
    backend.set("k", value)
    value[:] = b"xyz"
    assert backend.get("k") == b"abc"


def test_the_least_recently_used_object_goes_first() -> None:
    backend = opened(max_nbytes=3)
    for key in ("a", "b", "c"):
        backend.set(key, b"x")
    backend.get("a")
    backend.set("d", b"x")
    assert sorted(backend.list_keys("")) == ["a", "c", "d"]
    assert backend.stats()["evicted_objects"] == 1
    assert backend.stats()["used_nbytes"] == 3


def test_an_object_above_the_cap_is_dropped_and_counted() -> None:
    backend = opened(max_nbytes=3)
    with pytest.raises(BackendFull, match="max_nbytes=3"):
        backend.set("k", b"four")
    assert backend.batch_set(["k"], [views(b"four")]) == 0
    assert backend.stats()["dropped_writes"] == 2


def test_a_batch_ends_at_the_first_page_without_room() -> None:
    backend = opened(max_nbytes=3)
    pages = [views(b"1"), views(b"2", b"3"), views(b"four"), views(b"5")]
    assert backend.batch_set(["a", "b", "c", "d"], pages) == 2
    assert sorted(backend.list_keys("")) == ["a", "b"]
    assert backend.batch_set(["b", "d"], [views(b"6"), views(b"7")]) == 2
    assert (backend.get("b"), backend.stats()["used_nbytes"]) == (b"6", 3)


def test_a_batch_makes_no_room_by_what_has_expired() -> None:
    clock = Clock()
    backend = opened(clock, ttl_s=10, max_nbytes=2)
    backend.batch_set(["a", "b"], [views(b"1"), views(b"2")])
    clock.now = 10.0
    assert backend.batch_set(["c"], [views(b"3")]) == 1
    stats = backend.stats()
    assert (stats["expired_objects"], stats["evicted_objects"]) == (2, 0)


def test_an_object_older_than_its_ttl_is_gone() -> None:
    clock = Clock()
    backend = opened(clock, ttl_s=10)
    backend.set("k", b"x")
    clock.now = 9.9
    assert backend.exists("k")
    clock.now = 10.0
    assert backend.get("k") is None
    assert list(backend.list_keys("")) == []
    assert backend.stats()["used_nbytes"] == 0


def test_backends_that_share_a_name_share_objects_until_the_last_is_gone() -> None:
    first, second, other = opened(share="s"), opened(share="s"), opened(share="t")
    first.set("k", b"x")
    assert second.get("k") == b"x"
    assert other.get("k") is None
    first.close()
    assert second.get("k") == b"x"
    second.close()
    gc.collect()
    assert opened(share="s").get("k") is None


def test_delete_and_clear_remove_what_they_name() -> None:
    backend = opened()
    for key in ("a/1", "a/2", "b/1", "b/2"):
        backend.set(key, b"x")
    backend.delete(["a/1", "absent"])
    assert backend.clear("b/") == 2
    assert list(backend.list_keys("")) == ["a/2"]
    assert backend.stats()["objects"] == 1


def test_a_call_after_close_is_an_error() -> None:
    backend = opened()
    backend.close()
    backend.close()
    with pytest.raises(UseAfterClose):
        backend.get("k")
    with pytest.raises(UseAfterClose):
        backend.batch_exists(["k"])
    for store in (lambda: backend.set("k", b""), lambda: backend.batch_set(["k"], [views(b"")])):
        with pytest.raises(UseAfterClose):
            store()


def test_it_can_list_clear_and_count() -> None:
    backend = opened()
    assert isinstance(backend, Listable)
    assert isinstance(backend, Clearable)
    assert isinstance(backend, HasStats)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("3", 3), ("20GB", 20 * 10**9), ("1.5 KiB", 1536), ("2m", 2 * 10**6)]
)
def test_sizes_are_numbers_or_text_with_a_unit(text: str, nbytes: int) -> None:
    assert MemoryConfig.model_validate({"max_nbytes": text}).max_nbytes == nbytes


@pytest.mark.parametrize(
    "settings", [{"max_nbytes": "big"}, {"max_nbytes": 0}, {"ttl_s": -1}, {"cap": 3}]
)
def test_a_wrong_setting_is_an_error_that_names_it(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        MemoryConfig.model_validate(settings)
