"""Rules of wrappers: a wrapper looks like what it wraps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar, cast, runtime_checkable

import pytest

from hicache_core.storage.base import (
    BackendConfig,
    Buffer,
    Clearable,
    HasStats,
    Listable,
    RegistersMemory,
    StorageBackend,
)
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.wrapper import PASSED_ON, Adapters, BackendWrapper
from hicache_core.types import BackendContext

C = TypeVar("C")

CONTEXT = BackendContext(namespace="0" * 16)


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
    for kind in PASSED_ON:
        assert (wrapper.capability(kind) is not None) == isinstance(inner, kind)
        assert not isinstance(wrapper, kind), "asked of the object, not of its class"


def test_capabilities_reach_the_inner_backend() -> None:
    inner = Registers(BackendConfig(), CONTEXT)
    wrapper = BackendWrapper(BackendWrapper(inner))
    registers = wrapper.capability(RegistersMemory)
    assert registers is not None
    buffers = [memoryview(bytearray(4))]
    registers.register_memory(buffers)
    assert inner.seen is buffers


def test_what_a_wrapper_defines_itself_goes_first() -> None:
    wrapper = Counts(memory(), start=3)
    assert wrapper.capability(HasStats) is wrapper
    assert wrapper.stats() == {"own": 3}
    assert wrapper.capability(Listable) is wrapper.inner


@runtime_checkable
class MovesPages(Protocol):
    """A capability of which wrappers must know before they pass it on."""

    def move_pages(self) -> str: ...


class Moves(Plain):
    """Moves pages in a way of its own."""

    def move_pages(self) -> str:
        return "inner"


@dataclass
class Adapted:
    """What a wrapper gives in the place of ``MovesPages``."""

    wrapper: BackendWrapper
    inner: MovesPages

    def move_pages(self) -> str:
        return f"{self.wrapper.name}, {self.inner.move_pages()}"


class Adapts(BackendWrapper):
    """Knows that capability."""

    adapters: ClassVar[Adapters] = {MovesPages: Adapted}


def test_what_a_wrapper_does_not_know_is_not_passed_on_without_an_adapter() -> None:
    inner = Moves(BackendConfig(), CONTEXT)
    assert BackendWrapper(inner).capability(MovesPages) is None
    moves = Adapts(Adapts(inner)).capability(MovesPages)
    assert moves is not None
    assert moves.move_pages() == "plain, plain, inner"
    assert Adapts(memory()).capability(MovesPages) is None, "an adapter needs what it adapts"


class OneDirectory(StorageBackend):
    """Has an object that lists for it, and only if its settings say so."""

    name = "one directory"
    get = Plain.get
    exists = Plain.exists
    set = Plain.set

    def __init__(self, lister: Listable | None) -> None:
        super().__init__(BackendConfig(), CONTEXT)
        self.lister = lister

    def capability(self, kind: type[C]) -> C | None:
        if kind is Listable:
            return cast("C | None", self.lister)
        return super().capability(kind)


def test_a_backend_may_leave_a_capability_to_another_object() -> None:
    lister = memory()
    assert SealedBackend(OneDirectory(lister)).capability(Listable) is lister
    assert SealedBackend(OneDirectory(None)).capability(Listable) is None
    assert SealedBackend(OneDirectory(lister)).capability(Clearable) is None


def test_the_docs_name_every_capability_and_its_method() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/write-a-backend.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)\(", text, re.MULTILINE)
    methods = {
        kind.__name__: [name for name in vars(kind) if not name.startswith("_")]
        for kind in PASSED_ON
    }
    assert {name: [method] for name, method in rows} == methods


def test_a_wrapper_has_the_name_and_settings_of_its_inner() -> None:
    wrapper = SealedBackend(memory())
    assert wrapper.name == "memory"
    assert wrapper.config is wrapper.inner.config
    assert type(wrapper) is SealedBackend


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
    clearable = wrapper.capability(Clearable)
    assert clearable is not None
    assert clearable.clear("") == 1
    wrapper.close()


def test_a_backend_that_cannot_delete_says_so_through_its_wrappers() -> None:
    with pytest.raises(NotImplementedError, match="plain"):
        BackendWrapper(Plain(BackendConfig(), CONTEXT)).delete(["k"])
