"""What the modules of a model hold besides weights and buffers, as far as KV may depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

# Keys of a config that say nothing about KV, or where the model was read from.
NOT_OF_CONFIG = frozenset({"transformers_version", "use_cache"})

# Attributes of modules that change with use, or say where the model is rather than what it does.
_NOT_SETTINGS = frozenset(
    {
        "gradient_checkpointing",
        "hf_device_map",
        "max_seq_len_cached",
        "rope_deltas",
        "training",
        "warnings_issued",
    }
)

# Of peft's layers: which adapters are switched on.
_ADAPTER_SETTINGS = frozenset({"_active_adapter", "_disable_adapters"})

# Where a config keeps the name of its attention function, and what its text form says as well.
_ATTENTION = "_attn_implementation_internal"
PRIVATE_OF_CONFIG = (_ATTENTION, "_output_attentions")

# Rotary tables of these kinds follow from the config and the length of the sequence at hand.
_ROPE_THAT_MOVES = frozenset({"dynamic", "longrope"})

# Packages whose code is the same in every process that has the same versions, and whose hooks move
# tensors, look on, or compute weights from others that we read.
_KNOWN_PACKAGES = frozenset({"accelerate", "hicache_core", "peft", "torch", "transformers"})

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

# Where the noise of training comes from, by the names of the rates: dropout, layerdrop, jitter.
_NOISE = ("drop", "jitter")


def settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    """The attributes of a module that are plain numbers, or collections that hold such."""
    for name, value in vars(module).items():
        if name in _NOT_SETTINGS or (name.startswith("_") and name not in _ADAPTER_SETTINGS):
            continue
        if isinstance(value, str):
            if name == "_active_adapter" or _is_of_a_tuner(module, name):
                yield name, [value]  # peft writes one name as text or as a list of one
        elif value is not None and is_plain(value):
            yield name, value


def _is_of_a_tuner(module: nn.Module, name: str) -> bool:
    return name == "active_adapter" and "targeted_module_names" in vars(module)


def loose_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a module holds as attributes; those that it remakes with use are left out."""
    if moves_with_length(module):
        return
    for name, value in vars(module).items():
        is_own = name not in _NOT_SETTINGS and not name.startswith("_") and "cache" not in name
        if is_own and isinstance(value, torch.Tensor):
            yield name, value


def first_tables(module: nn.Module) -> Iterator[str]:
    """The names of buffers from which a module makes its tables for other lengths."""
    if moves_with_length(module):
        yield from (name for name in module._buffers if name.endswith("original_inv_freq"))


def others(module: nn.Module) -> Iterator[tuple[str, object]]:
    """The remaining attributes: text, None, functions, objects, and private settings.

    Private ones only of modules of known packages, since others may count there what they do.
    """
    is_known = _package(type(module).__module__) and not isinstance(module, PreTrainedModel)
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE or name in _NOT_SETTINGS or name == "generation_config":
            continue
        if name.startswith("_"):
            if is_known and name not in _ADAPTER_SETTINGS and is_plain(value):
                yield name, value
        elif isinstance(value, torch.Tensor | PreTrainedConfig) or _is_method(value):
            continue
        elif value is None or isinstance(value, str) or not is_plain(value):
            yield name, value


def configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """The configs of a model and of its modules, each once, and those inside them."""
    return _with_inner([model.config, *(vars(module).get("config") for module in model.modules())])


def further_configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """The configs of modules that are neither the model's nor inside it."""
    first = {id(config) for config in _with_inner([model.config])}
    return (config for config in configs(model) if id(config) not in first)


def _with_inner(waiting: list[Any]) -> Iterator[PreTrainedConfig]:
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            waiting.extend(vars(config).values())
            yield config


def of_config(config: PreTrainedConfig) -> Iterator[tuple[str, object]]:
    """What a config says itself."""
    for name, value in vars(config).items():
        is_named = not name.startswith("_") and name not in NOT_OF_CONFIG
        if is_named and not isinstance(value, PreTrainedConfig):
            yield name, value


def attention_of(model: nn.Module) -> list[str]:
    """Names of attention functions from outside transformers, which compute something else."""
    functions = AttentionInterface()  # type: ignore[no-untyped-call]
    names = {vars(config).get(_ATTENTION) for config in configs(model)}
    named = [name for name in names if isinstance(name, str) and name in functions]
    return sorted(name for name in named if not is_known_code(functions[name]))


def noisy(module: nn.Module) -> bool:
    """Whether a module drops or shakes something at random while it is trained."""
    named = ((name, value) for name, value in vars(module).items() if isinstance(value, float))
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return any(
        value > 0 and (is_dropout or any(word in name for word in _NOISE)) for name, value in named
    )


def moves_with_length(module: nn.Module) -> bool:
    """Whether a module's tables are other for longer sequences."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(isinstance(kind, str) and kind in _ROPE_THAT_MOVES for kind in kinds)


def foreign_code(model: nn.Module) -> Iterator[tuple[str, str, object]]:
    """Code of unknown origin that runs in a forward pass: module, what it is, and the function.

    Forward hooks, those for all modules included, and functions in place of a module's ``forward``.
    """
    everywhere = nn.modules.module
    hooks = chain(
        everywhere._global_forward_pre_hooks.values(), everywhere._global_forward_hooks.values()
    )
    found = [("", "a forward hook", hook) for hook in hooks]
    for name, module in model.named_modules():
        own = chain(module._forward_pre_hooks.values(), module._forward_hooks.values())
        found += [(name, "a forward hook", hook) for hook in own]
        for key in ("forward", "_old_forward"):  # the second one is inside accelerate's
            if key in vars(module):
                found.append((name, "a forward of its own", vars(module)[key]))
    return (entry for entry in found if not is_known_code(entry[2]))


def is_known_code(function: Any) -> bool:
    """Whether a function, or an object that is called, comes from a known package.

    Where it was defined counts, since a wrapper takes over the name of what it wraps.
    """
    function = getattr(function, "func", function)  # of a partial
    function = getattr(function, "__func__", function)  # of a method
    where = getattr(function, "__globals__", None)
    if where is not None:
        return _package(where.get("__name__"))
    return _package(getattr(function, "__module__", None) or type(function).__module__)


def _package(module: object) -> bool:
    return str(module).partition(".")[0] in _KNOWN_PACKAGES


def is_plain(value: object) -> bool:
    """Whether a value is None, a number or text, or a collection of such."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) for key in value) and all(
            map(is_plain, value.values())
        )
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


class Same:
    """Equal to another one of the very same object; keeps it, so that its address stays its own."""

    __slots__ = ("_of",)

    def __init__(self, of: object) -> None:
        """Of any object."""
        self._of = of

    def __eq__(self, other: object) -> bool:
        """Whether both are of one object."""
        return isinstance(other, Same) and self._of is other._of

    def __hash__(self) -> int:
        """As equality."""
        return id(self._of)


def frozen(value: object) -> Any:
    """What a value is now, to be compared later; what has no content is equal to itself alone."""
    match value:
        case None | bool() | int() | float() | str():
            state: Any = value
        case dict():
            state = tuple((key, frozen(item)) for key, item in value.items())
        case list() | tuple():
            state = tuple(map(frozen, value))
        case set() | frozenset():
            state = tuple(sorted(map(frozen, value), key=repr))
        case torch.Tensor():
            state = Same(value), state_of(value)
        case FunctionType() | BuiltinFunctionType() if _is_named(value):
            state = f"{value.__module__}.{value.__qualname__}"
        case partial():
            state = frozen(value.func), frozen(value.args), frozen(value.keywords)
        case _ if is_dataclass(value) and not isinstance(value, type):
            state = type(value).__qualname__, frozen(vars(value))
        case _:
            state = Same(value)
    return state


def has_objects(state: object) -> bool:
    """Whether a frozen value holds something that means nothing to another process."""
    return isinstance(state, Same) or (isinstance(state, tuple) and any(map(has_objects, state)))


def _is_named(function: FunctionType | BuiltinFunctionType) -> bool:
    """Whether its name says all of a function: it is of a known package and keeps nothing."""
    if isinstance(function, BuiltinFunctionType):
        return isinstance(function.__self__, type | ModuleType)
    return is_known_code(function) and not function.__closure__ and "<" not in function.__qualname__


def _is_method(value: object) -> bool:
    """Whether a value is a method of a known package, such as peft hangs on the model it wraps."""
    return isinstance(value, MethodType) and is_known_code(value)


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and version of a tensor, as far as they are known."""
    try:
        version = 0 if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), version
    except (RuntimeError, NotImplementedError):  # a wrapper around other tensors has no memory
        return 0, 0
