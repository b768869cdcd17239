"""Classes as people write them for SGLang's ``dynamic``; loaded by path, sglang is not needed."""

from __future__ import annotations

import ctypes
from typing import Any

import torch


class HiCacheStorage:
    """Stands in for SGLang's base class: same name, same optional methods."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        self.storage_config = storage_config
        self.kwargs = kwargs

    def register_mem_pool_host(self, pool: Any) -> None:
        self.pool = pool

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """As in SGLang: no body, answers None."""

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """As in SGLang: no body, answers None."""


class DuckStore:
    """No base class: the generic path one page at a time, keeping the tensors it is given."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        assert kwargs == {}
        self.limit = storage_config.extra_config.get("limit", 1000)
        self.data: dict[str, torch.Tensor] = {}
        self.closed = 0

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return self.data.get(key)

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        assert "/" not in key, "makes file names of keys"
        if len(self.data) >= self.limit:
            return False
        self.data[key] = value
        return True

    def exists(self, key: str) -> bool:
        return key in self.data

    def close(self) -> None:
        self.closed += 1


class ThreeMethodStore:
    """As SGLang's guide to storage backends words it: three methods, and no base class."""

    def __init__(self) -> None:
        self.data: dict[str, torch.Tensor] = {}

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def exists(self, key: str) -> bool:
        return key in self.data

    def set(self, key: str, value: torch.Tensor) -> None:
        self.data[key] = value


class BytesStore:
    """Likewise, with bytes; it raises KeyError for a miss, says whether it stored, and closes."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        self.limit = storage_config.extra_config.get("limit", 1000)
        self.data: dict[str, bytes] = {}
        self.closed = 0

    def get(self, key: str) -> bytes:
        return self.data[key]

    def exists(self, key: str) -> bool:
        return key in self.data

    def set(self, key: str, value: torch.Tensor) -> bool:
        if len(self.data) < self.limit:
            self.data[key] = value.numpy().tobytes()
        return key in self.data

    def close(self) -> None:
        self.closed += 1


class BatchStore(DuckStore, HiCacheStorage):
    """The generic path with its batch methods, filling the targets in place."""

    def batch_get(self, keys: list[str], target_locations: Any, target_sizes: Any = None) -> Any:
        answers = []
        for key, target in zip(keys, target_locations, strict=True):
            value = self.data.get(key)
            fits = value is not None and value.shape == target.shape
            answers.append(target.copy_(value) if fits else None)
        return answers

    def batch_set(
        self, keys: list[str], values: Any, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all([self.set(key, value.clone()) for key, value in zip(keys, values, strict=True)])

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        flags = [key in self.data for key in keys]
        return flags.index(False) if False in flags else len(flags)


class V1Store(HiCacheStorage):
    """``interface_v1``: reads and writes the registered memory by address, as RDMA would."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        super().__init__(storage_config, kwargs)
        assert storage_config.is_storage_writer
        assert storage_config.is_mla_model  # so: one address a page
        self.objects: dict[str, bytes] = {}
        self.is_finalized = False

    def on_host_pools_registered(self) -> None:
        assert self.pool is not None
        self.is_finalized = True

    def _places(self, keys: list[str], host_indices: torch.Tensor) -> list[tuple[int, int]]:
        n_pages = len(host_indices) // self.pool.page_size
        pointers, sizes = self.pool.get_page_buffer_meta(host_indices)
        assert self.is_finalized
        assert n_pages == len(keys) == len(pointers) == len(sizes)
        start = self.pool.kv_buffer.data_ptr()
        stop = start + self.pool.kv_buffer.numel()
        for pointer, size in zip(pointers, sizes, strict=True):
            assert start <= pointer <= pointer + size <= stop, "memory that was not registered"
        return list(zip(pointers, sizes, strict=True))

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        assert extra_info.prefix_keys is None
        found = []
        for key, (pointer, size) in zip(keys, self._places(keys, host_indices), strict=True):
            value = self.objects.get(key)
            found.append(value is not None)
            if value is not None:
                ctypes.memmove(pointer, value, min(size, len(value)))
        return found

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        for key, (pointer, size) in zip(keys, self._places(keys, host_indices), strict=True):
            self.objects[key] = ctypes.string_at(pointer, size)
        return [True] * len(keys)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        raise AssertionError("the v1 path does not come here")

    def set(self, key: str, value: Any = None, *places: Any) -> bool:
        raise AssertionError("the v1 path does not come here")

    def exists(self, key: str) -> bool:
        return key in self.objects


class OddStore(HiCacheStorage):
    """Answers every question with what ``extra_config["answer"]`` holds."""

    def _answer(self, *arguments: Any, **named: Any) -> Any:
        return self.storage_config.extra_config["answer"]

    get = set = exists = batch_get = batch_set = batch_exists = _answer
    batch_get_v1 = batch_set_v1 = _answer


class Unreachable(DuckStore):
    """Its constructor fails."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        raise KeyError("server_url")


class Unregistered(V1Store):
    """Refuses the memory."""

    def on_host_pools_registered(self) -> None:
        raise RuntimeError("cannot pin")


class NoV1(DuckStore):
    """A v1 class by its configuration only."""
