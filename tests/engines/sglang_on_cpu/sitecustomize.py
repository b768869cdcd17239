"""An emulation, for tests: answers the imports of GPU packages that SGLang's modules name.

SGLang imports compiled packages for GPUs wherever it runs, and calls none of them on a CPU. This
folder is on ``PYTHONPATH``, so Python loads this module first in every process that SGLang starts.
A package that is installed is left alone. A stand-in can be imported, subclassed and used as a
decorator; it raises when it is given a tensor, so nothing that a test looks at was computed by one.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

PACKAGES = (
    "cuda",
    "flash_attn",
    "flashinfer",
    "kernels",
    "sgl_kernel",
    "torchaudio",
    "torchcodec",
    "torchvision",
    "tvm_ffi",
    "xgrammar",
)


class StandIn(types.ModuleType):
    """A module, class or function of a package that is not here."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "99"
        self.__qualname__ = name

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        found = sys.modules.get(full) or StandIn(full)
        setattr(self, name, found)
        return found  # type: ignore[return-value]

    def __call__(self, *args: Any, **named: Any) -> Any:
        refuse_tensors(self.__name__, args, named)
        decorated = args[0] if len(args) == 1 and not named else None
        if isinstance(decorated, types.FunctionType):
            return kernel(decorated)
        return decorated if isinstance(decorated, type) else self

    def __getitem__(self, _key: object) -> StandIn:
        return self

    def __or__(self, _other: object) -> StandIn:
        return self

    __ror__ = __or__

    def __mro_entries__(self, _bases: tuple[object, ...]) -> tuple[type, ...]:
        return (Base,)

    def __instancecheck__(self, _instance: object) -> bool:
        return False

    def __subclasscheck__(self, _subclass: type) -> bool:
        return False

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class Base:
    """What a class of SGLang is derived from that names a base of a package that is not here."""

    def __init__(self, *args: Any, **named: Any) -> None:
        refuse_tensors(type(self).__name__, args, named)

    def __init_subclass__(cls, **_named: Any) -> None:
        super().__init_subclass__()


def kernel(function: types.FunctionType) -> Any:
    """A function that a stand-in decorated: it would have been compiled, and cannot run."""

    @functools.wraps(function)
    def cannot_run(*_args: Any, **_named: Any) -> Any:
        raise RuntimeError(f"{function.__qualname__} needs a package that is not installed")

    return cannot_run


def refuse_tensors(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raises RuntimeError when a stand-in is asked to compute."""
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    if tensor and any(isinstance(value, tensor) for value in (*args, *named.values())):
        raise RuntimeError(f"{name} was called with a tensor, and is not installed")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nobody before it has found, inside ``PACKAGES``."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        # docstring inherited
        if name.partition(".")[0] not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> StandIn:
        # docstring inherited
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        # docstring inherited
        pass


sys.meta_path.append(Finder())
