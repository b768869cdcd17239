"""Rules of wrappers: a wrapper looks like what it wraps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hicache_core.storage.base import (
    BackendConfig,
    Buffer,
    Clearable,
    Diagnosable,
    HasStats,
    Listable,
    RegistersMemory,
    StorageBackend,
)
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import BackendContext

CONTEXT = BackendContext(namespace="0" * 16)
CAPABILITIES = (RegistersMemory, Listable, Clearable, HasStats, Diagnosable)


class Plain(StorageBackend):
    """The three methods and nothing else."""

    name = "plain"

    def get(self, key: str) -> Buffer | None:
        return None

    def exists(self, key: str) -> bool:
        return False

    def set(self, key: str, value: Buffer) -> None:
        pass


class Registers(Plain):
    """Wants to know the memory."""

    name = "registers"
    seen: Sequence[memoryview] = ()

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        self.seen = buffers


class Counts(BackendWrapper):
    """Has statistics of its own and an argument of its own."""

    def __init__(self, inner: StorageBackend, *, start: int) -> None:
        super().__init__(inner)
        self.start = start

    def stats(self) -> dict[str, float]:
        return {"own": self.start}


def memory() -> MemoryBackend:
    return MemoryBackend(MemoryConfig(), CONTEXT)


@pytest.mark.parametrize(
    "inner", [Plain(BackendConfig(), CONTEXT), Registers(BackendConfig(), CONTEXT), memory()]
)
def test_a_wrapper_can_do_what_its_inner_can(inner: StorageBackend) -> None:
    wrapper = BackendWrapper(BackendWrapper(inner))
    for capability in CAPABILITIES:
        assert isinstance(wrapper, capability) == isinstance(inner, capability)


def test_capabilities_reach_the_inner_backend() -> None:
    inner = Registers(BackendConfig(), CONTEXT)
    wrapper = BackendWrapper(BackendWrapper(inner))
    assert isinstance(wrapper, RegistersMemory)
    buffers = [memoryview(bytearray(4))]
    wrapper.register_memory(buffers)
    assert inner.seen is buffers


def test_what_a_wrapper_defines_itself_goes_first() -> None:
    wrapper = Counts(memory(), start=3)
    assert isinstance(wrapper, HasStats)
    assert wrapper.stats() == {"own": 3}
    assert isinstance(wrapper, Listable)


def test_a_wrapper_has_the_name_and_settings_of_its_inner() -> None:
    wrapper = SealedBackend(memory())
    assert wrapper.name == "memory"
    assert wrapper.Config is MemoryConfig
    assert isinstance(wrapper, SealedBackend)
    assert type(wrapper) is type(SealedBackend(memory()))


def test_every_call_is_forwarded() -> None:
    wrapper = BackendWrapper(memory())
    wrapper.open()
    page = [memoryview(bytearray(b"v"))]
    assert wrapper.batch_set(["k"], [page]) == 1
    wrapper.set("l", b"w")
    assert wrapper.batch_get(["k"], [page]) == 1
    assert wrapper.batch_exists(["k", "l", "m"]) == 2
    assert wrapper.get("k") == b"v"
    wrapper.delete(["k"])
    assert not wrapper.exists("k")
    assert isinstance(wrapper, Clearable)
    assert wrapper.clear("") == 1
    wrapper.close()


def test_a_backend_that_cannot_delete_says_so_through_its_wrappers() -> None:
    with pytest.raises(NotImplementedError, match="plain"):
        BackendWrapper(Plain(BackendConfig(), CONTEXT)).delete(["k"])
