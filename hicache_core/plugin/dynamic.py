"""Backends named by module and class instead of an entry point: ``dynamic`` in the configuration.

Loads ``StorageBackend`` subclasses and classes written for SGLang's ``dynamic``. The latter run
behind an adapter that needs torch. Its module is imported by name and only for such a class, so
that this module does not need torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hicache_core.config.messages import config_error
from hicache_core.config.sources import nearest, read_inline
from hicache_core.errors import BrokenBackend, IncompatibleBackend
from hicache_core.plugin.manager import check_backend_class, module_is_there
from hicache_core.storage.base import StorageBackend

ADAPTER_MODULE = "hicache_core.integrations.sglang_dynamic"
_SGLANG_BASE = "HiCacheStorage"
_SGLANG_METHODS = ("get", "exists", "set")
NAMES_OF_CLASS = ("backend_name", "module_path", "class_name")


class DynamicSettings(BaseModel):
    """Which class to load; all other keys are settings of the backend."""

    model_config = ConfigDict(frozen=True, extra="allow")

    backend_name: str = Field(min_length=1, json_schema_extra={"allowed": "a name for the backend"})
    module_path: str = Field(
        min_length=1, json_schema_extra={"allowed": "a dotted module, or the path of a .py file"}
    )
    class_name: str = Field(
        min_length=1, json_schema_extra={"allowed": "the name of a class in it"}
    )
    tp_lcm_size: int | None = Field(
        None, ge=1, json_schema_extra={"allowed": "an integer of at least 1, or null"}
    )


def split_settings(
    settings: Mapping[str, object] | str,
) -> tuple[DynamicSettings, dict[str, object]]:
    """Splits settings into those that name the class and those of the backend's ``Config``.

    Args:
        settings: a mapping, JSON text, or ``@file``.

    Raises:
        ConfigError: the text is malformed, or one of the three keys is missing or wrong.
    """
    values = read_inline(settings, what="dynamic: ")
    try:
        chosen = DynamicSettings(**values)  # type: ignore[arg-type]  # this is the check
    except ValidationError as error:
        raise config_error(error, DynamicSettings, prefix="dynamic.") from None
    return chosen, dict(chosen.model_extra or {})


def load_class(settings: Mapping[str, object] | str) -> type[StorageBackend]:
    """The class that ``settings`` name, or an adapter around it if it is one for SGLang.

    Args:
        settings: ``backend_name``, ``module_path`` (a dotted module or the path of a .py file),
            ``class_name``, and the backend's own keys, which its ``Config`` validates later
            (``split_settings`` gives them).

    Raises:
        ConfigError: the settings are malformed.
        BrokenBackend: the module or class does not exist, or the module does not load.
        IncompatibleBackend: the class is not a backend; the message says what is missing.
    """
    chosen, _ = split_settings(settings)
    cls = _find_class(_import(chosen.module_path), chosen)
    offer = f"dynamic backend {chosen.backend_name!r}"
    if isinstance(cls, type) and not issubclass(cls, StorageBackend) and _is_for_sglang(cls):
        adapter: type[StorageBackend] = importlib.import_module(ADAPTER_MODULE).adapt(cls, chosen)
        cls = adapter
    elif isinstance(cls, type) and not issubclass(cls, StorageBackend):
        raise IncompatibleBackend(f"{offer}: {chosen.class_name} is not a backend: {_why_not(cls)}")
    check_backend_class(cls, offer)
    assert isinstance(cls, type)
    return cls


def _import(module_path: str) -> ModuleType:
    is_file = module_path.endswith(".py") or "/" in module_path
    is_there = is_file or module_is_there(module_path) or _is_in_working_directory(module_path)
    if not is_there:  # or its own imports fail, see below
        asked = ", ".join(entry or "(working directory)" for entry in [*sys.path, os.getcwd()])
        raise BrokenBackend(
            f"module_path {module_path!r}: no such module in sys.path: {asked};"
            " set PYTHONPATH, or give the path of a .py file"
        )
    try:
        return _import_file(module_path) if is_file else importlib.import_module(module_path)
    except BrokenBackend:
        raise
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything: translated
        raise BrokenBackend(
            f"module_path {module_path!r} does not load: {type(error).__name__}: {error}"
        ) from error


def _is_in_working_directory(module_path: str) -> bool:
    """Looks for a module in the working directory, and leaves it on ``sys.path`` if it is there.

    ``python -m`` has the working directory on its path. A console script has the folder of the
    script in its place.
    """
    sys.path.append(os.getcwd())
    if module_is_there(module_path):
        return True
    sys.path.pop()
    return False


def _import_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise BrokenBackend(f"module_path {path!r}: there is no file {file}")
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    name = f"hicache_dynamic_{file.stem}_{digest}"  # two files of one name stay two modules
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise BrokenBackend(f"module_path {path!r}: the name of {file} must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _find_class(module: ModuleType, chosen: DynamicSettings) -> object:
    if hasattr(module, chosen.class_name):
        return getattr(module, chosen.class_name)
    classes = [name for name, _ in inspect.getmembers(module, inspect.isclass)]
    raise BrokenBackend(
        f"module_path {chosen.module_path!r} has no class {chosen.class_name!r};"
        f" its classes are: {', '.join(classes) or 'none'}{nearest(chosen.class_name, classes)}"
    )


def _is_for_sglang(cls: type) -> bool:
    """Recognises such a class by its base's name, SGLang's signatures, or its three methods."""
    return _has_sglangs_signatures(cls) or has_three_methods_only(cls)


def has_three_methods_only(cls: type) -> bool:
    """Returns whether a class has ``get(key)``, ``exists(key)``, ``set(key, value)``, no more."""
    return not _has_sglangs_signatures(cls) and all(
        _takes(cls, method, n) for method, n in zip(_SGLANG_METHODS, (1, 1, 2), strict=True)
    )


def _has_sglangs_signatures(cls: type) -> bool:
    if any(base.__name__ == _SGLANG_BASE for base in cls.__mro__[1:]):
        return True
    if not all(callable(getattr(cls, method, None)) for method in _SGLANG_METHODS):
        return False
    if callable(getattr(cls, "batch_get_v1", None)):
        return True
    return "target_location" in inspect.signature(getattr(cls, "get")).parameters  # noqa: B009


def _takes(cls: type, method: str, n_arguments: int) -> bool:
    """Returns whether a method can be called with so many arguments by their places."""
    function = getattr(cls, method, None)
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*[None] * (1 + n_arguments))
    except (TypeError, ValueError):
        return False
    return True


def _why_not(cls: type) -> str:
    base = f"{StorageBackend.__module__}.{StorageBackend.__qualname__}"
    missing = [name for name in _SGLANG_METHODS if not callable(getattr(cls, name, None))]
    lacks = f"lacks {', '.join(missing)}" if missing else "takes other arguments"
    return (
        f"it is not a subclass of {base}, nor does it have the interface of SGLang's"
        f" {_SGLANG_BASE}, nor get(key), exists(key) and set(key, value): it {lacks}"
    )
