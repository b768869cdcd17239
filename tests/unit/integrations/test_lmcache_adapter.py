"""LMCache's L2 adapter on the file backend, with LMCache emulated (``lmcache_emulation``)."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import logging
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from hicache_core.build.backends import backend_from
from hicache_core.errors import BackendError, BackendUnavailable, ConfigError, UnknownBackend
from hicache_core.integrations.lmcache.held import HeldChunks
from hicache_core.process.logs import forget_logged
from hicache_core.storage.base import BackendConfig, StorageBackend
from hicache_core.storage.manifest import read_manifests
from hicache_core.types import BackendContext
from tests.unit.integrations.lmcache_emulation import (
    BF16,
    FP16,
    FP32,
    Buffer,
    BufferWithoutBytes,
    DType,
    LayoutDesc,
    ObjectKey,
    install,
)

SHAPE = (2, 16, 32)
NBYTES = 2 * 16 * 32 * 2
HINT = {0: LayoutDesc([SHAPE], [BF16])}
PACKAGE = "hicache_core.integrations.lmcache"

Make = Callable[..., Any]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.adapter")]:
        del sys.modules[name]
        del importlib.import_module(PACKAGE).adapter


@pytest.fixture
def make(patched: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Makes adapters on one store, as servers that share it; closed at the end."""
    install(patched, tmp_path_factory.mktemp("installed"), "0.5.6")
    path = tmp_path_factory.mktemp("store")
    made = []

    def one(*memory: object, **params: object) -> Any:
        params = {"backend": "file", "backend_config": {"path": str(path)}} | params
        made.append(importlib.import_module(PACKAGE).HiCacheL2Adapter(params, *memory))
        return made[-1]

    yield one
    for adapter in made:
        adapter.close()


def finished(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(10_000), "no event"
    os.eventfd_read(fd)


def store(adapter: Any, keys: Sequence[ObjectKey], buffers: Sequence[Buffer]) -> int:
    task = adapter.submit_store_task(list(keys), list(buffers))
    finished(adapter.get_store_event_fd())
    return int(adapter.pop_completed_store_tasks()[task])


def lookup(adapter: Any, keys: Sequence[ObjectKey], hints: Any = HINT) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(list(keys), hints)
    finished(adapter.get_lookup_and_lock_event_fd())
    bits: list[bool] = adapter.query_lookup_and_lock_result(task).bits
    assert adapter.query_lookup_and_lock_result(task) is None
    return bits


def load(adapter: Any, keys: Sequence[ObjectKey], buffers: Sequence[Buffer]) -> list[bool]:
    task = adapter.submit_load_task(list(keys), list(buffers))
    finished(adapter.get_load_event_fd())
    bits: list[bool] = adapter.query_load_result(task).bits
    assert adapter.query_load_result(task) is None
    return bits


def new_keys(n: int, **fields: Any) -> list[ObjectKey]:
    return [ObjectKey(os.urandom(32), **fields) for _ in range(n)]


def filled(n: int = 1, dtype: DType = BF16, shape: tuple[int, ...] = SHAPE) -> list[Buffer]:
    nbytes = dtype.itemsize * SHAPE[0] * SHAPE[1] * SHAPE[2]
    return [Buffer(os.urandom(nbytes), shape, dtype) for _ in range(n)]


def empty(n: int = 1, dtype: DType = BF16) -> list[Buffer]:
    return [Buffer(bytes(len(one.content)), SHAPE, dtype) for one in filled(n, dtype)]


def test_another_server_finds_and_loads_what_was_stored_also_behind_gaps(make: Make) -> None:
    keys, buffers = new_keys(5), filled(5)
    assert store(make(), keys[::2], buffers[::2]) == 3 * NBYTES
    other, into = make(), empty(5)
    expected = [True, False, True, False, True]
    assert lookup(other, keys) == expected
    assert load(other, keys, into) == expected
    assert [into[n].content == buffers[n].content for n in (0, 2, 4)] == [True] * 3


def test_the_three_events_differ_and_each_tells_of_its_own_tasks_only(make: Make) -> None:
    adapter = make()
    store_fd, lookup_fd, load_fd = fds = (
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    )
    assert len(set(fds)) == 3
    lookup(adapter, new_keys(1))
    assert select.select([store_fd, load_fd], [], [], 0)[0] == []
    store(adapter, new_keys(1), filled())
    assert select.select([lookup_fd, load_fd], [], [], 0)[0] == []


@pytest.mark.parametrize("hint", [{}, {0: LayoutDesc([(1,)], [FP32])}], ids=["none", "another"])
def test_a_lookup_finds_chunks_whatever_it_says_of_their_layout(make: Make, hint: Any) -> None:
    keys, buffers = new_keys(3), filled(3)
    first = make()
    assert lookup(first, keys, hint) == [False] * 3
    store(first, keys, buffers)
    assert lookup(first, keys, hint) == [True] * 3
    assert lookup(make(), keys, hint) == [True] * 3, "a server that has stored nothing yet"


def test_servers_with_other_dtypes_neither_read_nor_replace_each_others_chunks(make: Make) -> None:
    keys = new_keys(2)
    for dtype in (BF16, FP16, FP32):  # the first two have one size
        adapter, mine, into = make(), filled(2, dtype), empty(2, dtype)
        assert load(adapter, keys, into) == [False] * 2
        assert [bytes(one.content) for one in into] == [bytes(len(into[0].content))] * 2
        assert store(adapter, keys, mine) == 2 * len(mine[0].content)
        assert load(adapter, keys, into) == [True] * 2
        assert [one.content for one in into] == [one.content for one in mine]
        assert lookup(adapter, keys, {0: LayoutDesc([SHAPE], [dtype])}) == [True] * 2
    first, into = make(), empty(2, BF16)
    assert load(first, keys, into) == [True] * 2, "the last ones did not replace the first"


@pytest.mark.parametrize(
    "other",
    [
        {"model_name": "another/model"},
        {"kv_rank": 0x02010201},
        {"object_group_id": 1},
        {"cache_salt": "somebody else"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_every_field_of_a_key_tells_chunks_apart(make: Make, other: dict[str, Any]) -> None:
    adapter, [key] = make(), new_keys(1)
    store(adapter, [key], filled())
    changed = ObjectKey(key.chunk_hash, **other)
    assert lookup(adapter, [key, changed], {}) == [True, False]
    assert load(adapter, [changed], empty()) == [False]


def test_a_serde_tells_chunks_apart_and_is_found_by_a_hint_of_the_plain_layout(make: Make) -> None:
    keys = new_keys(2)
    packed = filled(2, DType("uint8", 1), (NBYTES // 2,))
    store(make(serde="fp8 e4m3fn"), keys, packed)
    assert lookup(make(serde="fp8 e4m3fn"), keys) == [True] * 2
    other = make(serde="fp8 e5m2")
    into = filled(2, DType("uint8", 1), (NBYTES // 2,))
    assert lookup(other, keys) == [False] * 2
    assert load(other, keys, into) == [False] * 2


def test_a_variant_tells_chunks_of_one_dtype_and_shape_apart(make: Make) -> None:
    keys = new_keys(2)
    uint8 = DType("uint8", 1)  # vLLM's dtype of every fp8 format
    hint = {0: LayoutDesc([SHAPE], [uint8])}
    store(make(variant="kv fp8_e4m3"), keys, filled(2, uint8))
    assert lookup(make(variant="kv fp8_e4m3"), keys, hint) == [True] * 2
    for other in (make(variant="kv fp8_e5m2"), make()):
        assert lookup(other, keys, hint) == [False] * 2
        assert load(other, keys, empty(2, uint8)) == [False] * 2


@pytest.mark.parametrize("form", ["text", "file"])
def test_the_backend_config_may_be_text_or_a_file(make: Make, tmp_path: Path, form: str) -> None:
    text = json.dumps({"path": str(tmp_path / "store")})
    (tmp_path / "secret.json").write_text(text)
    config = text if form == "text" else f"@{tmp_path}/secret.json"
    adapter, keys = make(backend_config=config), new_keys(1)
    store(adapter, keys, filled())
    assert lookup(adapter, keys) == [True]
    assert (tmp_path / "store").is_dir()


def test_short_hashes_and_several_shards_and_sizes_go_through_one_task(make: Make) -> None:
    keys = [ObjectKey(b"\x01\x02\x03\x04"), *new_keys(1, object_group_id=1), *new_keys(1)]
    buffers = [*filled(), *filled(1, FP32), *filled()]
    assert store(make(), keys, buffers) == sum(len(one.content) for one in buffers)
    adapter, into = make(), [*empty(), *empty(1, FP32), *empty()]
    hints = {0: LayoutDesc([SHAPE], [BF16]), 1: LayoutDesc([SHAPE], [FP32])}
    assert lookup(adapter, keys, hints) == [True] * 3
    assert load(adapter, keys, into) == [True] * 3
    assert [one.content for one in into] == [one.content for one in buffers]


def test_a_task_of_no_keys_ends(make: Make) -> None:
    adapter = make()
    assert store(adapter, [], []) == 0
    assert lookup(adapter, []) == []
    assert load(adapter, [], []) == []


def test_a_chunk_that_leaves_the_store_is_no_longer_counted(make: Make) -> None:
    adapter, keys = make(), new_keys(4)
    store(adapter, keys, filled(4))
    store(adapter, keys[:1], filled())
    assert adapter.used == 4 * NBYTES, "stored twice, counted once"
    adapter.delete(keys[:1])
    assert adapter.used == 3 * NBYTES
    other = make()
    lookup(other, keys)
    load(other, keys[1:2], empty())  # so that it knows their layout
    other.delete(keys[1:3])
    assert lookup(adapter, keys[:3]) == [False] * 3
    assert adapter.used == NBYTES
    assert load(adapter, keys, empty(4)) == [False, False, False, True]
    assert adapter.told.accessed[-1] == keys[3:]
    assert other.used == 0


def test_every_namespace_in_the_store_is_explained(make: Make, tmp_path: Path) -> None:
    config = {"path": str(tmp_path)}
    adapter = make(backend_config=config)
    store(adapter, new_keys(1), filled())
    store(adapter, new_keys(1, cache_salt="a tenant"), filled())
    adapter.close()
    backend = backend_from("file", config, BackendContext(""))
    backend.open()
    manifests = list(read_manifests(backend).values())
    backend.close()
    said = [(one.fields["engine"], one.fields["layout"]) for one in manifests if one is not None]
    assert sorted(said) == [("lmcache", "chunk"), ("lmcache", "chunk"), ("lmcache", "index")]
    assert len(manifests) == 3


def test_a_damaged_chunk_is_not_loaded_and_is_stored_again(make: Make, tmp_path: Path) -> None:
    config = {"path": str(tmp_path)}
    adapter, keys, buffers = make(backend_config=config), new_keys(2), filled(2)
    store(adapter, keys, buffers)
    for segment in tmp_path.glob("segments/*.seg"):
        damaged = segment.read_bytes().replace(buffers[0].content[:64], bytes(64))
        segment.write_bytes(damaged)
    assert load(adapter, keys, empty(2)) == [False, True]
    assert adapter.report_status()["refused_chunks"]["corrupt"] == 1
    assert store(adapter, keys[:1], buffers[:1]) == NBYTES
    into = empty(2)
    assert load(adapter, keys, into) == [True, True]
    assert [one.content for one in into] == [one.content for one in buffers]


class Breakable(StorageBackend):
    """A store in memory that fails once it is told to."""

    name = "breakable"
    broken = False
    registered: ClassVar[list[memoryview]] = []

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self.objects: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        self.check()
        return self.objects.get(key)

    def exists(self, key: str) -> bool:
        self.check()
        return key in self.objects

    def set(self, key: str, value: Any) -> None:
        self.check()
        self.objects[key] = bytes(value)

    def delete(self, keys: Sequence[str]) -> None:
        self.check()

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        self.registered.extend(buffers)

    def bounds_calls(self) -> bool:
        return True

    def check(self) -> None:
        if self.broken:
            raise BackendUnavailable("the store is gone")


BREAKABLE: dict[str, Any] = {
    "backend": "dynamic",
    "backend_config": {
        "backend_name": "breakable",
        "module_path": __name__,
        "class_name": "Breakable",
    },
}


def test_a_store_that_fails_answers_no_and_nothing_raises(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, keys, buffers = make(**BREAKABLE), new_keys(2), filled(2)
    store(adapter, keys, buffers)
    assert load(adapter, keys, empty(2)) == [True] * 2
    monkeypatch.setattr(Breakable, "broken", True)
    adapter.delete(keys)
    assert load(adapter, keys, empty(2)) == [False] * 2
    assert adapter.used == 2 * NBYTES, "not known to be gone"
    for _ in range(3):  # until the breaker opens, and beyond
        assert store(adapter, new_keys(1), filled()) == -1
        assert lookup(adapter, keys) == [False, False]
        assert load(adapter, keys, empty(2)) == [False, False]
    assert not adapter.report_status()["is_healthy"]


def test_failures_of_one_kind_are_logged_once_whatever_they_say(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_logged()
    adapter, seconds = make(), itertools.count()

    def refuse(_: object) -> None:
        raise BackendUnavailable(f"tries again in {next(seconds)} s")

    broken = SimpleNamespace(backend=SimpleNamespace(delete=refuse))
    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG, f"{PACKAGE}.adapter"):
        patch.setattr(adapter, "_store", broken)
        for _ in range(3):
            adapter.delete(new_keys(1))
    warned = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "delete failed: BackendUnavailable" in warned[0]
    assert f"tries again in {next(seconds) - 1} s" in caplog.messages[-1]


def test_no_task_waits_until_a_new_model_is_identified(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def slowly(name: str) -> str:
        assert may_end.wait(20)
        return name

    monkeypatch.setattr(f"{PACKAGE}.models.model_identity", slowly)
    adapter, keys, into = make(), new_keys(2), empty(2)
    stored = adapter.submit_store_task(keys, filled(2))
    found = adapter.submit_lookup_and_lock_task(new_keys(2), HINT)
    loaded = adapter.submit_load_task(new_keys(2), into)
    assert adapter.pop_completed_store_tasks() == {}
    may_end.set()
    finished(adapter.get_store_event_fd())
    assert adapter.pop_completed_store_tasks() == {stored: 2 * NBYTES}
    finished(adapter.get_lookup_and_lock_event_fd())
    assert adapter.query_lookup_and_lock_result(found).bits == [False] * 2
    finished(adapter.get_load_event_fd())
    assert adapter.query_load_result(loaded).bits == [False] * 2
    assert lookup(adapter, keys) == [True] * 2


def test_what_lmcache_counts_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, keys = make(), new_keys(5)
    monkeypatch.setattr(adapter, "_held", HeldChunks(3))
    store(adapter, keys[:3], filled(3))
    load(adapter, keys[:1], empty())
    store(adapter, keys[3:], filled(2))
    assert adapter.told.deleted == [(keys[1:3], [NBYTES] * 2)]
    assert adapter.used == 3 * NBYTES
    assert lookup(adapter, keys) == [True] * 5, "the store has them all"


def test_the_memory_of_all_chunks_is_registered_with_a_store_that_wants_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Breakable, "registered", [])
    memory = bytearray(4096)
    pinned = (ctypes.c_uint8 * len(memory)).from_buffer(memory)
    make(SimpleNamespace(ptr=ctypes.addressof(pinned), size=len(memory)), **BREAKABLE)
    registered = Breakable.registered[0]
    registered[5:8] = b"abc"
    assert (len(registered), bytes(memory[5:8])) == (len(memory), b"abc")


def test_a_store_that_refuses_the_memory_is_closed_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Breakable, "close", lambda _: closed.append(True))

    def refuse(*_: object) -> None:
        raise BackendUnavailable("this memory cannot be registered")

    monkeypatch.setattr(Breakable, "register_memory", refuse)
    memory = (ctypes.c_uint8 * 4096)()
    described = SimpleNamespace(ptr=ctypes.addressof(memory), size=len(memory))
    with pytest.raises(BackendUnavailable, match="cannot be registered"):
        make(described, **BREAKABLE)
    assert len(closed) == 1


def test_buffers_and_hints_that_cannot_be_used_end_their_task_with_no(make: Make) -> None:
    adapter, keys = make(), new_keys(1)
    useless = [BufferWithoutBytes(bytes(NBYTES), SHAPE, BF16)]
    assert store(adapter, keys, useless) == -1
    assert load(adapter, keys, useless) == [False]
    assert lookup(adapter, keys, {0: None}) == [False]


def test_two_threads_store_and_load_at_once(make: Make) -> None:
    adapter, failures = make(), []
    keys, buffers = new_keys(64), filled(64)

    def controller(start: Callable[[int], None]) -> None:
        try:
            for n in range(0, 64, 4):
                start(n)
        except BaseException as error:
            failures.append(error)
            raise

    def put(n: int) -> None:
        assert store(adapter, keys[n : n + 4], buffers[n : n + 4]) == 4 * NBYTES

    def get(n: int) -> None:
        while not all(lookup(adapter, keys[n : n + 4])):
            pass
        into = empty(4)
        assert load(adapter, keys[n : n + 4], into) == [True] * 4
        assert [one.content for one in into] == [one.content for one in buffers[n : n + 4]]

    threads = [threading.Thread(target=controller, args=(start,)) for start in (put, get)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert adapter.used == 64 * NBYTES


def test_closing_twice_does_nothing_more_and_calls_afterwards_do_not_raise(make: Make) -> None:
    adapter, keys = make(), new_keys(1)
    adapter.close()
    adapter.close()
    adapter.submit_store_task(keys, filled())
    task = adapter.submit_lookup_and_lock_task(keys, HINT)
    assert adapter.query_lookup_and_lock_result(task) is None
    adapter.submit_unlock(keys)
    adapter.delete(keys)


def test_memory_tags_name_a_shared_storage(make: Make) -> None:
    assert make().get_memory_tags() == ("storage", "remote")


def test_a_touch_is_told_to_lmcache(make: Make) -> None:
    adapter, keys = make(), new_keys(2)
    adapter.submit_touch(keys)
    assert adapter.told.accessed == [keys]


@pytest.mark.parametrize(
    ("params", "kind", "words"),
    [
        ({}, ConfigError, "adapter_params.backend: this setting is required"),
        ({"backend": "file", "pathh": "x"}, ConfigError, "adapter_params.pathh: unknown setting"),
        ({"backend": "fiel"}, UnknownBackend, "no backend named 'fiel'"),
        ({"backend": "file", "backend_config": {"pth": "x"}}, ConfigError, "pth: unknown"),
        (
            {"backend": "file", "backend_config": "@/no/file.json"},
            ConfigError,
            "file /no/file.json: no such file",
        ),
        ({"backend": "file", "backend_config": {"path": "/proc/no"}}, BackendError, "/proc/no"),
    ],
)
def test_wrong_params_are_refused_at_start(
    patched: pytest.MonkeyPatch,
    tmp_path: Path,
    params: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    install(patched, tmp_path, "0.5.7rc2")
    with pytest.raises(kind) as refused:
        importlib.import_module(PACKAGE).HiCacheL2Adapter(params)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ['{"password": "hush"', '["hush"]'])
def test_a_backend_config_that_is_wrong_text_is_not_quoted(
    patched: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    install(patched, tmp_path, "0.5.6")
    params = {"backend": "redis", "backend_config": text}
    with pytest.raises(ConfigError, match="backend_config: ") as refused:
        importlib.import_module(PACKAGE).HiCacheL2Adapter(params)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("version", ["0.5.5", "0.6.0", "0.5.10", "unknown"])
def test_another_lmcache_is_refused_before_it_is_imported(
    patched: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    install(patched, tmp_path, "0.5.6")
    patched.setattr(f"{PACKAGE}.version", lambda _: version)
    with pytest.raises(ConfigError, match=f"LMCache is {version}.*0.5.6 to 0.5.7"):
        _ = importlib.import_module(PACKAGE).HiCacheL2Adapter
    assert f"{PACKAGE}.adapter" not in sys.modules


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="HiCacheL2AdapterConfig"):
        _ = importlib.import_module(PACKAGE).HiCacheL2AdapterConfig
