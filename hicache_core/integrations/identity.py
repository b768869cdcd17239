"""The identity of a model: a digest of everything that its KV depends on, and its changes."""

from __future__ import annotations

import hashlib
import json
import secrets
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import xxhash

from hicache_core.errors import ConfigError, SpecError
from hicache_core.integrations.module_settings import (
    NOT_OF_CONFIG,
    attention_of,
    first_tables,
    foreign_code,
    frozen,
    further_configs,
    has_objects,
    loose_tensors,
    moves_with_length,
    noisy,
    of_config,
    others,
    settings,
    state_of,
)
from hicache_core.integrations.watch import NO_LOOK, Watch
from hicache_core.types import Namespace


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
        named = [] if fingerprint is None else foreign_code(model)
        self._named_code = [function for _, _, function in named]
        self._named: dict[object, str] = {}  # states with objects, whose names only we know
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
        self._first_others = _others_of(self._model, self._contents)
        self._watch = Watch(self._model)
        self._last_look = self._watch.look()
        self._variant: str | None = None

    def weights_changed(self) -> None:
        """Makes the next check read everything: for changes of weights that it cannot see."""
        self._contents.forget()
        self._last_look = NO_LOOK

    def variant(self) -> str | None:
        """The name of the model's present state, in addition to the fingerprint.

        Returns:
            None for the state at the start, otherwise 32 hex digits. A state that comes back gets
            its earlier name.

        Raises:
            SpecError, ConfigError: as at the start.
        """
        if self._watch.has_changed(self._last_look):
            self._check()
            self._watch = Watch(self._model)
            look = self._watch.look()
            digest = _digest(self._model, self._contents)
            if more := self._others_name():
                digest = hashlib.sha256(f"{digest} {more}".encode()).hexdigest()[:32]
            self._variant = None if digest == self._first else digest
            self._last_look = look
        return self._variant

    def _others_name(self) -> str:
        """Names what the digest leaves out, as far as it has changed since the start."""
        now, first = _others_of(self._model, self._contents), self._first_others
        names = sorted(now.keys() | first.keys())
        changed = tuple((key, now.get(key)) for key in names if now.get(key) != first.get(key))
        if not has_objects(changed):
            return repr(changed) if changed else ""
        return self._named.setdefault(changed, secrets.token_hex(16))

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
        check_adapters(self._model)
        for name, what, function in foreign_code(self._model):
            if not any(function is known for known in self._named_code):
                called = getattr(function, "__qualname__", type(function).__name__)
                raise ConfigError(
                    f"module {name or 'model'!r} has {what}, {called}, which may change the KV "
                    "without changing the fingerprint; remove it, or give CachedModel.open a "
                    "fingerprint= that covers it (an Engine accepts none)"
                )


def check_adapters(model: Any) -> None:
    """Raises SpecError for adapters whose KV follows from more than the token ids before it."""
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    for name, adapter in adapters.items():
        kind = f"adapter {name!r} is a {type(adapter).__name__}"
        if getattr(adapter, "is_prompt_learning", False):
            raise SpecError(
                f"{kind}: its virtual tokens are in the KV but not among the token ids, so its "
                "pages cannot have keys"
            )
        if getattr(adapter, "alora_invocation_tokens", None):
            raise SpecError(
                f"{kind} with invocation tokens, which switch it on behind their last place in the "
                "prompt: a longer prompt may move that place, so KV before it cannot be reused"
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
        state = state_of(tensor)
        known = self._known.get(name)
        if known is not None and known[0]() is tensor and known[1] == state:
            return known[2]
        content = _content(name, tensor) if self._reads else "as named"
        text = f"{tuple(tensor.shape)} {tensor.dtype} {content}"
        self._known[name] = (weakref.ref(tensor), state, text)
        return text


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
    named = [(name, dict(settings(module))) for name, module in model.named_modules()]
    digest.update(_as_json({name: found for name, found in named if found}))
    held: dict[str, Any] = {}
    for name, module in model.named_modules():
        buffers = () if moves_with_length(module) else module._buffers.items()
        for key, tensor in (*buffers, *loose_tensors(module)):
            if tensor is not None:
                held[f"{name}.{key}" if name else key] = tensor
    held.update(model.state_dict(keep_vars=True))
    shared: dict[int, str] = {}  # tied weights are read once
    for name, tensor in sorted(held.items()):
        if id(tensor) not in shared:
            shared[id(tensor)] = contents.of(name, tensor)
        digest.update(f"\n{name} {shared[id(tensor)]}".encode())
    noise = [name for name, module in model.named_modules() if module.training and noisy(module)]
    if rare := noise + attention_of(model):
        digest.update(_as_json(rare))
    return digest.hexdigest()[:32]


def _others_of(model: Any, contents: _Contents) -> dict[str, object]:
    """What the digest leaves out, as a model of this class has it like any other at the start."""
    state: dict[str, object] = {
        f"further config {n}": frozen(dict(of_config(config)))
        for n, config in enumerate(further_configs(model))
    }
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        state[name] = kind, frozen(dict(others(module)))
        for key in first_tables(module):
            state[f"{name}.{key}"] = contents.of(f"{name}.{key}", module._buffers[key])
    return state


def _without_origin(value: object) -> object:
    """A config without what says where it came from, in its nested configs too."""
    if isinstance(value, dict):
        return {
            str(key): _without_origin(item)
            for key, item in value.items()
            if not (str(key).startswith("_") or key in NOT_OF_CONFIG)
        }
    return [_without_origin(item) for item in value] if isinstance(value, list | tuple) else value


def _as_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=_in_words).encode()


def _in_words(value: object) -> object:
    """Text for values that JSON does not have, without memory addresses."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value) if isinstance(value, torch.dtype) else type(value).__qualname__
