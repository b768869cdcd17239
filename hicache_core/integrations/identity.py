"""The identity of a model: a digest of everything that its KV depends on, and its changes."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import xxhash
from torch import nn

from hicache_core.errors import ConfigError, SpecError
from hicache_core.types import Namespace

# Keys of a config that say nothing about KV, or where the model was read from.
_NOT_OF_CONFIG = frozenset({"transformers_version", "use_cache"})

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

# Of peft's layers: which adapters are switched on. Other private names are nobody's business.
_ADAPTER_SETTINGS = frozenset({"_active_adapter", "_disable_adapters"})

# Rotary tables of these kinds follow from the config and the length of the sequence at hand.
_ROPE_THAT_MOVES = frozenset({"dynamic", "longrope"})

# Packages whose hooks move tensors, look on, or compute weights from others that we read.
_KNOWN_HOOKS = frozenset({"accelerate", "hicache_core", "peft", "torch", "transformers"})


def fingerprint_of_model(model: Any) -> str:
    """A digest of everything that the KV depends on, 32 hex digits, equal in every process.

    It covers the config, every weight and buffer in memory (also those that are not saved), and the
    plain settings of the modules: attention scaling, LoRA scaling, the active adapters. It reads
    all weights: a tenth of a second for each GB on a CPU. For large models on a device,
    ``hicache_core.kv.fingerprint.fingerprint_of_files`` is quicker.

    Raises:
        SpecError: the weights cannot be read: quantized by torch itself, or not in memory.
    """
    return _digest(model, _Contents())


class ModelIdentity:
    """A model's fingerprint, and a further name for its state once weights or adapters change.

    Each request checks the model, which takes some hundred microseconds. The check sees weights
    that are written in place (``load_state_dict``, a training step), replaced or moved, buffers,
    adapters that are added or switched, plain settings of modules, and hooks. It does not see
    writes that bypass torch's version counter (``weight.data += x``, or another library writing
    into the memory): call ``weights_changed`` after those.

    May be called on any thread; the model must not change meanwhile.

    Attributes:
        fingerprint: of the model when it was opened.
    """

    def __init__(self, model: Any, fingerprint: str | None = None) -> None:
        """Reads the whole model, unless it is given a name.

        Args:
            model: a transformers model.
            fingerprint: the caller's own digest of the model as it is now, hooks included.

        Raises:
            SpecError: an adapter has virtual tokens (prompt or prefix tuning), which have no token
                ids; or weights cannot be read.
            ConfigError: the model has a forward hook, and no ``fingerprint`` is given.
        """
        self._model = model
        self._contents = _Contents()
        self._named_hooks = [] if fingerprint is None else [hook for _, hook in _hooks(model)]
        self._check()
        if fingerprint is None:
            self.fingerprint = _digest(model, self._contents)
            self._begin(self.fingerprint)
        else:
            self.fingerprint = fingerprint
            self.settle()

    def settle(self) -> None:
        """Declares that the model as it is now has the fingerprint, without reading it.

        For an engine that splits the model after it was read.
        """
        self._contents = _Contents()
        with self._contents.taken_as_read():
            self._begin(_digest(self._model, self._contents))

    def _begin(self, first: str) -> None:
        self._first = first
        self._watch = _Watch(self._model)
        self._last_look = self._watch.look()
        self._variant: str | None = None

    def weights_changed(self) -> None:
        """Makes the next check read everything: for changes of weights that it cannot see."""
        self._contents.forget()
        self._last_look = _NO_LOOK

    def variant(self) -> str | None:
        """The name of the model's present state, in addition to the fingerprint.

        Returns:
            None for the state at the start, otherwise 32 hex digits. A state that comes back gets
            its earlier name.

        Raises:
            SpecError, ConfigError: as at the start.
        """
        if self._watch.look() != self._last_look:
            self._check()
            self._watch = _Watch(self._model)
            look = self._watch.look()
            digest = _digest(self._model, self._contents)
            self._variant = None if digest == self._first else digest
            self._last_look = look
        return self._variant

    def namespace(self, namespace: Namespace, inputs: str | None = None) -> Namespace:
        """The namespace for the keys of a request.

        This is ``namespace`` itself while the model is unchanged and there are no ``inputs``;
        otherwise one with a ``variant`` of its own.

        Args:
            namespace: of the request.
            inputs: a digest of what the KV depends on besides token ids; None for nothing.
        """
        parts = [part for part in (self.variant(), inputs) if part is not None]
        if not parts:
            return namespace
        return replace(namespace, variant=hashlib.sha256("/".join(parts).encode()).hexdigest()[:32])

    def _check(self) -> None:
        adapters: Mapping[str, Any] = getattr(self._model, "peft_config", None) or {}
        for name, adapter in adapters.items():
            if getattr(adapter, "is_prompt_learning", False):
                raise SpecError(
                    f"adapter {name!r} is a {type(adapter).__name__}: its virtual tokens are in "
                    "the KV but not among the token ids, so its pages cannot have keys"
                )
        for name, hook in _hooks(self._model):
            if not _is_known(hook) and not any(hook is known for known in self._named_hooks):
                called = getattr(hook, "__qualname__", type(hook).__name__)
                raise ConfigError(
                    f"module {name or 'model'!r} has a forward hook, {called}, which may change "
                    "the KV without changing the fingerprint; remove it, or give CachedModel.open "
                    "a fingerprint= that covers the hook (an Engine accepts no hooks)"
                )


class _Look(NamedTuple):
    """The result of one check; comparable only with others of this process."""

    modules: tuple[int, ...]
    tensors: tuple[object, ...]
    settings: tuple[object, ...]
    hooks: tuple[int, ...]


_NO_LOOK = _Look((), (), (), ())


class _Watch:
    """The places in a model that show a change, found once and then read quickly."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [module._modules for module in modules if module._modules]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        holders: list[Any] = [module._parameters for module in modules if module._parameters]
        holders += [module._buffers for module in modules if _fixed_buffers(module)]
        self._holders = holders
        # Weak, so that weights that were replaced can be freed; dead once the memory may be reused.
        self._tensors = [weakref.ref(tensor) for tensor in self._held()]
        self._plain: list[tuple[Callable[[dict[str, Any]], object], dict[str, Any]]] = []
        self._nested: list[tuple[str, dict[str, Any]]] = []
        for module in modules:
            names = [name for name, _ in _settings(module)]
            kept = vars(module)
            plain = [name for name in names if not isinstance(kept[name], dict | list | set)]
            if plain:
                self._plain.append((itemgetter(*plain), kept))
            self._nested += [(name, kept) for name in names if name not in plain]

    def _held(self) -> Iterator[torch.Tensor]:
        values = chain.from_iterable(map(dict.values, self._holders))
        return (tensor for tensor in values if tensor is not None)

    def look(self) -> _Look:
        """Reads these places now."""
        children = chain.from_iterable(map(dict.values, self._children))
        tensors = list(self._held())
        same = [ref() is tensor for ref, tensor in zip(self._tensors, tensors, strict=False)]
        states = map(_state_of, tensors)
        try:
            settings = [get(kept) for get, kept in self._plain]
            settings += [_frozen(kept[name]) for name, kept in self._nested]
        except KeyError:  # one is gone
            settings = []
        hooks = chain.from_iterable(map(dict.values, self._hooks)) if any(self._hooks) else ()
        return _Look(
            tuple(map(id, children)),
            (len(tensors), all(same) and len(same) == len(self._tensors), *states),
            tuple(settings),
            tuple(map(id, hooks)),
        )


class _Contents:
    """Digests of tensors, kept as long as a tensor shows no change."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[weakref.ref[torch.Tensor], object, str]] = {}
        self._reads = True

    @contextmanager
    def taken_as_read(self) -> Iterator[None]:
        """In this context tensors count as those of the fingerprint and are not read."""
        self._reads = False
        yield
        self._reads = True

    def forget(self) -> None:
        """Makes the next call read everything again."""
        self._known.clear()

    def of(self, name: str, tensor: torch.Tensor) -> str:
        """Shape, dtype and content as text.

        Raises:
            SpecError: they cannot be read.
        """
        state = _state_of(tensor)
        known = self._known.get(name)
        if known is not None and known[0]() is tensor and known[1] == state:
            return known[2]
        content = _content(name, tensor) if self._reads else "as named"
        text = f"{tuple(tensor.shape)} {tensor.dtype} {content}"
        self._known[name] = (weakref.ref(tensor), state, text)
        return text


def _state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and version of a tensor, as far as they are known."""
    try:
        version = 0 if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), version
    except (RuntimeError, NotImplementedError):  # a wrapper around other tensors has no memory
        return 0, 0


def _content(name: str, tensor: torch.Tensor) -> str:
    try:
        raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{name} is a {type(tensor).__name__} of {getattr(tensor, 'dtype', 'no dtype')} that "
            f"cannot be read for the fingerprint ({str(error).splitlines()[0]}); give "
            "fingerprint= instead"
        ) from None
    return xxhash.xxh3_128_hexdigest(raw)


def _digest(model: Any, contents: _Contents) -> str:
    digest = hashlib.sha256(_as_json(_without_origin(model.config.to_dict())))
    named = [(name, dict(_settings(module))) for name, module in model.named_modules()]
    digest.update(_as_json({name: settings for name, settings in named if settings}))
    tensors: dict[str, Any] = {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules()
        if _fixed_buffers(module)
        for key, buffer in module._buffers.items()
        if buffer is not None
    }
    tensors.update(model.state_dict(keep_vars=True))
    shared: dict[int, str] = {}  # tied weights are read once
    for name, tensor in sorted(tensors.items()):
        if id(tensor) not in shared:
            shared[id(tensor)] = contents.of(name, tensor)
        digest.update(f"\n{name} {shared[id(tensor)]}".encode())
    return digest.hexdigest()[:32]


def _fixed_buffers(module: nn.Module) -> bool:
    """Whether a module has buffers, and they stay as they are however long the sequences get."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return bool(module._buffers) and not any(
        isinstance(kind, str) and kind in _ROPE_THAT_MOVES for kind in kinds
    )


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    """The attributes of a module that are plain numbers, or collections that hold such."""
    for name, value in vars(module).items():
        if name in _NOT_SETTINGS or (name.startswith("_") and name not in _ADAPTER_SETTINGS):
            continue
        if isinstance(value, str) and name not in _ADAPTER_SETTINGS:
            continue  # names and paths
        if value is not None and _is_plain(value):
            yield name, value


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) for key in value) and all(
            map(_is_plain, value.values())
        )
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _frozen(value: object) -> object:
    """The same as a value that does not change with the module."""
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return frozenset(value) if isinstance(value, set) else value


def _without_origin(value: object) -> object:
    """A config without what says where it came from, in its nested configs too."""
    if isinstance(value, dict):
        return {
            str(key): _without_origin(item)
            for key, item in value.items()
            if not (str(key).startswith("_") or key in _NOT_OF_CONFIG)
        }
    return [_without_origin(item) for item in value] if isinstance(value, list | tuple) else value


def _as_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=_in_words).encode()


def _in_words(value: object) -> object:
    """Text for values that JSON does not have, without memory addresses."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value) if isinstance(value, torch.dtype) else type(value).__qualname__


def _hooks(model: nn.Module) -> Iterator[tuple[str, object]]:
    for name, module in model.named_modules():
        for hook in chain(module._forward_pre_hooks.values(), module._forward_hooks.values()):
            yield name, hook


def _is_known(hook: object) -> bool:
    hook = getattr(hook, "func", hook)  # of a partial
    source = getattr(hook, "__module__", None) or type(hook).__module__
    return str(source).partition(".")[0] in _KNOWN_HOOKS
