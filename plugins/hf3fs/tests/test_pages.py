"""Pages to slots and back, in each mode and on each metadata store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from hicache_core.errors import BackendFull, UseAfterClose
from hicache_core.storage.base import StorageBackend
from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import (
    blank,
    bytes_of,
    content,
    hits,
    key_of,
    new_backend,
    page_of,
    put,
)


@pytest.mark.parametrize("shape", [(0,), (1,), (64, 2936), (7, 0, 13), (1,) * 1500, ()])
def test_pages_of_any_shape_round_trip(anyhow: Open, shape: tuple[int, ...]) -> None:
    backend, key = anyhow(), key_of(shape)
    assert backend.batch_set([key], [page_of(key, shape)]) == 1
    page = blank(shape)
    assert backend.batch_get([key], [page]) == 1
    assert bytes_of(page) == content(key, sum(shape))
    assert backend.get(key) == content(key, sum(shape))


def test_objects_larger_than_an_iovec_cell_round_trip(anyhow: Open) -> None:
    nbytes = 1_000_003
    backend = anyhow(slot_nbytes=1 << 20, file_size=16 << 20, iovec_nbytes=1 << 17, entries=4)
    assert put(backend, range(9), nbytes) == 9
    assert hits(backend, range(9), nbytes) == 9


def test_an_object_larger_than_a_slot_is_refused_and_counted(anyhow: Open) -> None:
    backend = anyhow()
    pages = [page_of(key_of(n), (nbytes,)) for n, nbytes in enumerate((3000, 9000, 3000))]
    assert backend.batch_set([key_of(n) for n in range(3)], pages) == 1
    with pytest.raises(BackendFull, match="raise slot_nbytes"):
        backend.set(key_of("big"), bytes(9000))
    assert backend.stats()["oversized_writes"] == 2


def test_a_batch_larger_than_the_slab_stores_a_leading_part(anyhow: Open) -> None:
    backend = anyhow(file_size=8 * 4096)
    assert put(backend, range(20)) == 8
    assert hits(backend, range(20)) == 8
    assert backend.stats()["dropped_writes"] == 12


def test_a_full_slab_gives_up_what_was_used_least(anyhow: Open) -> None:
    backend = anyhow(file_size=8 * 4096)
    for n in range(40):
        assert put(backend, [n]) == 1
        assert backend.exists(key_of(n))
    backend.check_integrity()
    assert [hits(backend, [n]) for n in range(40)] == [0] * 32 + [1] * 8


def test_a_full_slab_whose_objects_are_all_being_read_says_so(anyhow: Open) -> None:
    backend = anyhow(file_size=2 * 4096)
    put(backend, range(2))
    hits(backend, range(2))
    assert put(backend, [3]) == 0
    with pytest.raises(BackendFull, match="raise file_size or lower lease_s"):
        backend.set(key_of(3), b"x")


def test_ranks_have_slabs_of_their_own_and_read_each_others(anyhow: Open) -> None:
    first, second = anyhow(rank=0), anyhow(rank=1)
    put(first, ["a"])
    put(second, ["b"])
    assert hits(first, ["a", "b"]) == hits(second, ["b", "a"]) == 2
    directory = first._settings.file_path_prefix.parent
    names = {path.name for path in directory.glob("*.slab")}
    assert names == {"kv.r0.4096.slab", "kv.r1.4096.slab"}


def test_objects_survive_a_restart(anyhow: Open) -> None:
    backend = anyhow()
    put(backend, range(5))
    backend.close()
    assert hits(anyhow(), range(5)) == 5


def test_deleted_keys_are_gone_and_can_be_stored_again(anyhow: Open) -> None:
    backend = anyhow()
    put(backend, range(4))
    backend.delete([key_of(1), key_of("absent")])
    assert backend.batch_exists([key_of(n) for n in range(4)]) == 1
    assert hits(backend, range(4)) == 1
    assert put(backend, range(4)) == 4
    assert hits(backend, range(4)) == 4
    assert backend.clear(key_of(0)[:17]) == 4
    assert list(backend.list_keys("")) == []
    backend.check_integrity()


def test_each_page_is_shown_while_it_moves_and_may_be_refused(anyhow: Open) -> None:
    backend, keys = anyhow(), [key_of(n) for n in range(6)]
    pages = [page_of(key, (1000,)) for key in keys]

    def leaving(n: int) -> None:
        pages[n][0][0] = n

    assert backend.batch_set_visiting(keys, pages, leaving) == 6
    arrived = [blank((1000,)) for _ in keys]
    refused = 4
    n_filled = backend.batch_get_visiting(
        keys, arrived, lambda n: arrived[n][0][0] == n and n != refused
    )
    assert n_filled == refused
    assert backend.exists(keys[refused]), "whoever refuses a page says what becomes of it"


def test_pages_behind_gaps_are_found_read_and_stored(anyhow: Open) -> None:
    backend, keys, shape = anyhow(), [key_of(n) for n in range(24)], (64, 936)
    gaps = {0, 3, 4, 9, 23}
    pages = [page_of(key, shape) for key in keys]
    assert backend.batch_set(keys, pages) == 24
    backend.delete([keys[n] for n in gaps])
    backend.set(keys[7], b"of another length")
    present = [n not in gaps for n in range(24)]
    readable = [n not in gaps | {7} for n in range(24)]
    assert backend.exists_each(keys) == present == StorageBackend.exists_each(backend, keys)
    for get_each in (backend.get_each, partial(StorageBackend.get_each, backend)):
        target = [blank(shape) for _ in keys]
        assert get_each(keys, target) == readable
        assert [bytes_of(page) == content(key, 1000) for key, page in zip(keys, target, strict=True)
                ] == readable  # fmt: skip
    before = backend.stats()["reads"]
    assert backend.set_each(keys, pages) == [True] * 24
    assert backend.get_each(keys, target) == [True] * 24
    assert backend.stats()["reads"] - before == 24
    assert backend.exists_each([]) == backend.get_each([], []) == backend.set_each([], []) == []
    backend.check_integrity()


def test_a_page_that_does_not_fit_a_slot_keeps_no_other_from_being_stored(anyhow: Open) -> None:
    backend, keys = anyhow(file_size=4 * 4096), [key_of(n) for n in range(8)]
    sizes = [3000, 9000, 3000, 3000, 9000, 3000, 3000, 3000]
    pages = [page_of(key, (nbytes,)) for key, nbytes in zip(keys, sizes, strict=True)]
    stored = [True, False, True, True, False, True, False, False]  # there are four slots
    assert backend.set_each(keys, pages) == stored == backend.exists_each(keys)
    counts = backend.stats()
    assert (counts["writes"], counts["dropped_writes"], counts["oversized_writes"]) == (4, 4, 2)


def test_each_page_behind_gaps_is_shown_with_its_own_number(anyhow: Open) -> None:
    backend, keys = anyhow(), [key_of(n) for n in range(8)]
    pages = [page_of(key, (1000,)) for key in keys]
    pages[2] = page_of(keys[2], (9000,))  # fits no slot

    def leaving(n: int) -> None:
        pages[n][0][0] = n

    assert backend.set_each_visiting(keys, pages, leaving) == [n != 2 for n in range(8)]
    backend.delete([keys[5]])
    arrived = [blank((1000,)) for _ in keys]
    filled = backend.get_each_visiting(keys, arrived, lambda n: arrived[n][0][0] == n and n != 4)
    assert filled == [n not in (2, 4, 5) for n in range(8)]
    assert backend.exists(keys[4]), "whoever refuses a page says what becomes of it"


def test_many_threads_at_once_get_their_own_bytes(anyhow: Open) -> None:
    backend = anyhow(file_size=48 * 4096, lease_s=0.02)

    def work(name: int) -> None:
        for n in range(15):
            labels = [f"{name} {n % 4} {i}" for i in range(3)]
            put(backend, labels)
            hits(backend, labels)
            hits(backend, [f"{1 - name % 2} {n % 4} {i}" for i in range(3)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    backend.check_integrity()
    assert backend.stats()["damaged_slots"] == 0


def test_calls_before_open_and_after_close_are_refused(anyhow: Open) -> None:
    backend = anyhow()
    backend.close()
    backend.close()
    with pytest.raises(UseAfterClose):
        backend.exists(key_of(0))
    with pytest.raises(UseAfterClose):
        new_backend(backend._settings.file_path_prefix).get(key_of(0))
