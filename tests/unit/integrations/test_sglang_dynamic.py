"""Classes for SGLang's ``dynamic`` as storage backends: pages arrive whole or are a miss."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hicache_core.errors import (
    BackendFull,
    BackendUnavailable,
    IncompatibleBackend,
    UseAfterClose,
)
from hicache_core.integrations import sglang_dynamic
from hicache_core.plugin.dynamic import load_class, split_settings
from hicache_core.plugin.manager import backend_settings
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import BackendContext, Page

CLASSES = Path(__file__).parent / "sglang_classes.py"
NBYTES = 96  # 64 of a header, 32 of a payload in two segments
KEYS = [f"{'0' * 16}/{i:064x}" for i in range(6)]
WORKING = [
    ("DuckStore", 0),
    ("ThreeMethodStore", 0),
    ("BytesStore", 0),
    ("BatchStore", 0),
    ("V1Store", 1),
]


def opened(cls: str, v1: int = 0, nbytes: int = NBYTES, **extra: object) -> StorageBackend:
    settings = {"backend_name": "guest", "module_path": str(CLASSES), "class_name": cls, **extra}
    if v1:
        settings["interface_v1"] = v1
    loaded = load_class(settings)
    _, rest = split_settings(settings)
    backend = loaded(backend_settings(loaded, rest), BackendContext("0" * 16, nbytes))
    backend.open()
    return backend


def page(fill: int) -> Page:
    return [memoryview(bytearray([fill] * n)) for n in (64, 16, 16)]


def odd_answers(backend: StorageBackend) -> float:
    assert isinstance(backend, sglang_dynamic.SGLangBackend)
    return backend.stats()["odd_answers"]


def bytes_of(pages: list[Page]) -> list[bytes]:
    return [b"".join(page) for page in pages]


@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_pages_come_back_as_they_went(cls: str, v1: int) -> None:
    backend = opened(cls, v1)
    written = [page(i + 1) for i in range(len(KEYS))]
    assert backend.batch_set(KEYS, written) == len(KEYS)
    assert backend.batch_exists(KEYS) == len(KEYS)
    read = [page(0) for _ in KEYS]
    assert backend.batch_get(KEYS, read) == len(KEYS)
    assert bytes_of(read) == bytes_of(written)
    assert odd_answers(backend) == 0


@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_the_callers_memory_is_free_once_set_returns(cls: str, v1: int) -> None:
    backend = opened(cls, v1)
    mine = page(1)
    backend.batch_set(KEYS[:1], [mine])
    for segment in mine:
        segment[:] = bytes(segment.nbytes)
    read = page(0)
    assert backend.batch_get(KEYS[:1], [read]) == 1
    assert b"".join(read) == bytes([1]) * NBYTES


@pytest.mark.parametrize("hole", range(len(KEYS)))
@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_only_pages_before_the_first_hole_count(cls: str, v1: int, hole: int) -> None:
    backend = opened(cls, v1)
    there = [key for n, key in enumerate(KEYS) if n != hole]
    backend.batch_set(there, [page(1) for _ in there])
    assert backend.batch_exists(KEYS) == hole
    assert backend.batch_get(KEYS, [page(0) for _ in KEYS]) == hole


@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_pages_behind_holes_are_read_by_one_call_of_the_class(
    cls: str, v1: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(cls, v1)
    there = [n for n in range(len(KEYS)) if n not in (0, 2)]
    mask = [n in there for n in range(len(KEYS))]
    stored = [page(n + 1) for n in there]
    assert list(backend.set_each([KEYS[n] for n in there], stored)) == [True] * len(there)
    assert list(backend.exists_each(KEYS)) == mask
    read = [page(0) for _ in KEYS]
    calls = count_reads(backend, monkeypatch)
    assert list(backend.get_each(KEYS, read)) == mask
    assert len(calls) == (1 if cls in ("BatchStore", "V1Store") else len(KEYS))
    assert bytes_of([read[n] for n in there]) == bytes_of(stored)
    for call in (backend.get_each, backend.set_each):
        assert list(call([], [])) == []


def count_reads(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each call by which the class reads."""
    calls: list[str] = []
    foreign = backend._foreign

    def counted(name: str) -> None:
        read = getattr(foreign, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return read(*arguments)

        monkeypatch.setattr(foreign, name, call)

    for name in ("get", "batch_get", "batch_get_v1"):
        if hasattr(foreign, name):
            counted(name)
    return calls


@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_the_single_methods_work_and_a_miss_is_none(cls: str, v1: int) -> None:
    backend = opened(cls, v1)
    assert backend.get(KEYS[0]) is None
    assert backend.exists(KEYS[0]) is False
    backend.set(KEYS[0], bytes([3]) * NBYTES)
    assert backend.exists(KEYS[0]) is True
    value = backend.get(KEYS[0])
    assert value is not None
    assert bytes(value) == bytes([3]) * NBYTES


@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_empty_batches_are_no_calls(cls: str, v1: int) -> None:
    backend = opened(cls, v1)
    assert backend.batch_set([], []) == backend.batch_get([], []) == backend.batch_exists([]) == 0


@pytest.mark.parametrize("cls", ["DuckStore", "BatchStore"])
def test_a_full_store_counts_the_leading_pages_that_are_stored(cls: str) -> None:
    backend = opened(cls, limit=2)
    assert backend.batch_set(KEYS, [page(1) for _ in KEYS]) == 2
    assert backend.batch_get(KEYS, [page(0) for _ in KEYS]) == 2
    with pytest.raises(BackendFull, match="did not store"):
        backend.set(KEYS[4], bytes(NBYTES))
    room_for_two = [n < 2 for n in range(len(KEYS))]
    assert list(opened(cls, limit=2).set_each(KEYS, [page(1) for _ in KEYS])) == room_for_two


def test_an_object_of_another_size_is_a_miss() -> None:
    backend = opened("DuckStore")
    backend.set(KEYS[0], bytes(NBYTES - 1))
    assert backend.batch_get(KEYS[:1], [page(0)]) == 0
    v1 = opened("V1Store", 1)
    short, long = ([memoryview(bytearray(NBYTES + more))] for more in (-1, 1))
    assert v1.batch_set(KEYS[:3], [page(1), short, long]) == 2
    assert v1.batch_get(KEYS[:2], [page(0), page(0)]) == 1
    assert v1.batch_get(KEYS[:2], [page(0), short]) == 2
    assert list(v1.set_each(KEYS[:3], [page(1), long, short])) == [True, False, True]
    assert list(v1.get_each(KEYS[:3], [page(0), long, page(0)])) == [True, False, False]
    assert list(v1.get_each(KEYS[:3], [page(0), short, short])) == [True] * 3
    assert len(v1.get(KEYS[1]) or b"") == NBYTES - 1


@pytest.mark.parametrize("v1", [0, 1])
@pytest.mark.parametrize(
    "answer",
    ["yes", 2, 2.0, -1, 99, [True], [True, None], [1, 1], [True] * 3, {"a": True}, b"xx"],
)
def test_an_odd_answer_is_a_counted_miss(v1: int, answer: object) -> None:
    backend = opened("OddStore", v1, answer=answer)
    keys = KEYS[:2]
    read = [page(7), page(7)]
    assert backend.batch_get(keys, read) == 0
    assert odd_answers(backend) == 1
    assert bytes_of(read) == bytes_of([page(7), page(7)])
    assert list(backend.get_each(keys, read)) == [False, False]
    assert odd_answers(backend) >= 2
    assert bytes_of(read) == bytes_of([page(7), page(7)])
    if answer != 2:
        assert backend.batch_set(keys, [page(1), page(1)]) == 0
        assert backend.batch_exists(keys) == 0
        assert odd_answers(backend) >= 3
    assert backend.exists(keys[0]) is False


def test_the_base_classs_empty_v1_bodies_are_a_miss() -> None:
    backend = opened("BatchStore", 1)  # inherits batch_get_v1 without a body
    assert backend.batch_set(KEYS, [page(1) for _ in KEYS]) == 0
    assert backend.batch_get(KEYS, [page(0) for _ in KEYS]) == 0
    assert odd_answers(backend) == 2


def test_a_batch_larger_than_the_staging_memory_goes_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang_dynamic, "_STAGING_NBYTES", 4 * NBYTES)
    backend = opened("V1Store", 1)
    written = [page(i + 1) for i in range(len(KEYS))]
    assert backend.batch_set(KEYS, written) == len(KEYS)
    read = [page(0) for _ in KEYS]
    assert backend.batch_get(KEYS, read) == len(KEYS)
    assert bytes_of(read) == bytes_of(written)
    again = [page(0) for _ in KEYS]
    assert list(backend.get_each(KEYS, again)) == [True] * len(KEYS)
    assert bytes_of(again) == bytes_of(written)


def test_threads_do_not_mix_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_dynamic, "_STAGING_NBYTES", 3 * (NBYTES + 8))
    backend = opened("V1Store", 1)
    wrong: list[int] = []

    def work(number: int) -> None:
        keys = [f"{'0' * 16}/{number:032x}{i:032x}" for i in range(4)]
        for _ in range(20):
            backend.batch_set(keys, [page(number) for _ in keys])
            read = [page(0) for _ in keys]
            if backend.batch_get(keys, read) != 4 or bytes_of(read) != bytes_of([page(number)] * 4):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert sorted(backend._pool._free) == [0, 1, 2]  # type: ignore[attr-defined]


def test_slots_come_back_when_a_call_raises() -> None:
    backend: Any = opened("V1Store", 1)
    backend._foreign.batch_get_v1 = None
    with pytest.raises(TypeError):
        backend.batch_get(KEYS, [page(0) for _ in KEYS])
    assert len(backend._pool._free) == backend._pool.n_slots


def test_the_class_gets_what_sglang_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = opened("V1Store", 1, url="x", token="secret")
    config = backend._foreign.storage_config
    assert config.extra_config == {
        "backend_name": "guest",
        "module_path": str(CLASSES),
        "class_name": "V1Store",
        "interface_v1": 1,
        "url": "x",
        "token": "secret",
    }
    assert (config.tp_rank, config.tp_size, config.model_name) == (0, 1, "0" * 16)
    assert backend._foreign.kwargs == {}
    assert backend.name == "guest"


def test_tp_lcm_size_is_moved_to_the_config_as_sglang_does() -> None:
    backend: Any = opened("V1Store", 1, tp_lcm_size=4)
    assert backend._foreign.storage_config.tp_lcm_size == 4
    assert "tp_lcm_size" not in backend._foreign.storage_config.extra_config


def test_sglangs_own_dataclass_is_used_if_the_class_brought_sglang_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class HiCacheStorageConfig:  # an older one, with fewer fields
        tp_rank: int
        is_mla_model: bool
        extra_config: dict[str, object]
        is_storage_writer: bool = True

    emulation = SimpleNamespace(HiCacheStorageConfig=HiCacheStorageConfig)
    monkeypatch.setitem(sys.modules, "sglang.srt.mem_cache.hicache_storage", emulation)
    backend: Any = opened("V1Store", 1)
    assert isinstance(backend._foreign.storage_config, HiCacheStorageConfig)
    assert backend._foreign.storage_config.extra_config["interface_v1"] == 1


def test_a_constructor_that_fails_makes_the_store_unavailable() -> None:
    with pytest.raises(BackendUnavailable, match=r"Unreachable.*'guest' raised KeyError"):
        opened("Unreachable")
    with pytest.raises(BackendUnavailable, match=r"Unregistered.*RuntimeError: cannot pin"):
        opened("Unregistered", 1)


def test_v1_without_its_methods_or_without_a_size_is_refused() -> None:
    with pytest.raises(IncompatibleBackend, match=r"NoV1 lacks register_mem_pool_host, batch_get"):
        opened("NoV1", 1)
    with pytest.raises(IncompatibleBackend, match="object_nbytes is 0"):
        opened("V1Store", 1, nbytes=0)


@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_after_close_every_call_says_so(cls: str, v1: int) -> None:
    backend: Any = opened(cls, v1)
    backend.close()
    backend.close()
    calls: list[Callable[[], object]] = [
        lambda: backend.get(KEYS[0]),
        lambda: backend.set(KEYS[0], bytes(NBYTES)),
        lambda: backend.exists(KEYS[0]),
        lambda: backend.batch_exists(KEYS),
        lambda: backend.batch_get(KEYS, [page(0) for _ in KEYS]),
        lambda: backend.batch_set(KEYS, [page(0) for _ in KEYS]),
    ]
    for call in calls:
        with pytest.raises(UseAfterClose, match="'guest' is closed"):
            call()


def test_tensors_of_other_types_count_by_their_bytes() -> None:
    backend: Any = opened("DuckStore")
    value = torch.arange(NBYTES // 2, dtype=torch.bfloat16)
    backend._foreign.data[KEYS[0].replace("/", "-")] = value.reshape(2, -1)
    read = page(0)
    assert backend.batch_get(KEYS[:1], [read]) == 1
    assert b"".join(read) == bytes(value.view(torch.uint8).numpy())


@pytest.mark.parametrize(("cls", "v1"), WORKING)
def test_sealed_pages_survive_the_class_and_damaged_ones_are_a_miss(cls: str, v1: int) -> None:
    guest: Any = opened(cls, v1)
    backend = SealedBackend(guest)
    written = [page(i + 1) for i in range(len(KEYS))]
    assert backend.batch_set(KEYS, written) == len(KEYS)
    read = [page(0) for _ in KEYS]
    assert backend.batch_get(KEYS, read) == len(KEYS)
    assert bytes_of(read) == bytes_of(written)
    first, second = (key.replace("/", "-") for key in KEYS[2:4])
    theirs = getattr(guest._foreign, "foreign", guest._foreign)
    store = theirs.objects if v1 else theirs.data
    store[first] = store[second]  # another page's bytes under this key
    assert backend.batch_get(KEYS, [page(0) for _ in KEYS]) == 2
    assert backend.stats()["sealed_foreign"] == 1
