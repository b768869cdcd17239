"""Emulates the parts of LMCache 0.5.6 that an L2 adapter touches, for tests without LMCache.

Written from the documented interface: base class with its accounting, bitmap, keys, buffers and
event notifier. The real server runs the adapter in ``make engines``.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass(frozen=True)
class ObjectKey:
    chunk_hash: bytes
    model_name: str = "a/model"
    kv_rank: int = 0x01000100
    object_group_id: int = 0
    cache_salt: str = ""


@dataclass(frozen=True)
class DType:
    """Prints and measures as torch's does."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"


BF16, FP16, FP32 = DType("bfloat16", 2), DType("float16", 2), DType("float32", 4)


@dataclass
class LayoutDesc:
    shapes: list[tuple[int, ...]]
    dtypes: list[DType]


class Buffer:
    """A buffer of one or several tensors, whose byte array has the format ``<B`` of ctypes."""

    def __init__(self, content: bytes, shape: tuple[int, ...], dtype: DType) -> None:
        self.content = bytearray(content)
        self.meta = SimpleNamespace(shape=shape, dtype=dtype, shapes=None, dtypes=None)

    def get_size(self) -> int:
        return len(self.content)

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self.content)


class BufferWithoutBytes(Buffer):
    """As of an L1 on a GPU's file system."""

    @property
    def byte_array(self) -> memoryview:
        raise NotImplementedError("no bytes in host memory")


class Bitmap:
    def __init__(self, size: int) -> None:
        self.bits = [False] * size

    def batched_set(self, places: Sequence[int]) -> None:
        for place in places:
            self.bits[place] = True


class L2StoreResult(int):
    def __new__(cls, success: bool, nbytes: int) -> L2StoreResult:
        return super().__new__(cls, nbytes if success else -1)


class EventNotifier:
    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1


@dataclass
class Listener:
    """What an adapter has told LMCache."""

    stored: list[tuple[list[ObjectKey], list[int]]] = field(default_factory=list)
    accessed: list[list[ObjectKey]] = field(default_factory=list)
    deleted: list[tuple[list[ObjectKey], list[int]]] = field(default_factory=list)


class L2AdapterInterface(ABC):
    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self.told = Listener()
        self.used = 0

    def _notify_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.told.stored.append((keys, sizes))
        self.used += sum(sizes)

    def _notify_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.told.accessed.append(keys)

    def _notify_keys_deleted(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.told.deleted.append((keys, sizes))
        self.used -= sum(sizes)

    @abstractmethod
    def get_store_event_fd(self) -> int: ...
    @abstractmethod
    def get_lookup_and_lock_event_fd(self) -> int: ...
    @abstractmethod
    def get_load_event_fd(self) -> int: ...
    @abstractmethod
    def submit_store_task(self, keys: Any, objects: Any) -> int: ...
    @abstractmethod
    def pop_completed_store_tasks(self) -> Any: ...
    @abstractmethod
    def submit_lookup_and_lock_task(self, keys: Any, group_layout_descs: Any) -> int: ...
    @abstractmethod
    def query_lookup_and_lock_result(self, task_id: int) -> Any: ...
    @abstractmethod
    def submit_unlock(self, keys: Any) -> None: ...
    @abstractmethod
    def submit_load_task(self, keys: Any, objects: Any) -> int: ...
    @abstractmethod
    def query_load_result(self, task_id: int) -> Any: ...
    @abstractmethod
    def get_memory_tags(self) -> Any: ...
    @abstractmethod
    def close(self) -> None: ...


def install(patch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
    """Makes ``import lmcache`` find the emulation, and its metadata, until ``patch`` is undone.

    Args:
        patch: undone by the test.
        folder: empty; the metadata goes there.
        version: which LMCache it says it is.
    """
    info = folder / f"lmcache-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmcache\nVersion: {version}\n")
    patch.syspath_prepend(str(folder))
    api = {
        "MemoryTags": lambda *tags: tags,
        "MemorySegment": SimpleNamespace(STORAGE="storage"),
        "MemoryResidency": SimpleNamespace(REMOTE="remote"),
    }
    contents: dict[str, dict[str, object]] = {
        "lmcache": {},
        "lmcache.lmcache_native": {"Bitmap": Bitmap},
        "lmcache.logging": {"init_logger": lambda name: None},
        "lmcache.v1": {},
        "lmcache.v1.distributed": {},
        "lmcache.v1.distributed.api": api,
        "lmcache.v1.distributed.internal_api": {"L2StoreResult": L2StoreResult},
        "lmcache.v1.distributed.l2_adapters": {},
        "lmcache.v1.distributed.l2_adapters.base": {"L2AdapterInterface": L2AdapterInterface},
        "lmcache.v1.platform": {"create_event_notifier": EventNotifier},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        patch.setitem(sys.modules, name, module)
