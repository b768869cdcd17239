"""Watches a model for changes of anything that its KV may depend on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as everywhere

from hicache_core.integrations.module_settings import (
    PRIVATE_OF_CONFIG,
    configs,
    first_tables,
    frozen,
    loose_tensors,
    moves_with_length,
    noisy,
    of_config,
    others,
    settings,
    state_of,
)


class Look(NamedTuple):
    """The result of one check; comparable only with others of this process."""

    modules: tuple[object, ...]
    tensors: tuple[object, ...]
    settings: tuple[object, ...]
    hooks: tuple[int, ...]


NO_LOOK = Look((), (), (), ())


class Watch:
    """The places in a model that show a change, found once and then read quickly."""

    def __init__(self, model: nn.Module) -> None:
        """Finds them.

        Args:
            model: is read, not changed.
        """
        self._modules = modules = list(model.modules())
        self._kept = [vars(module) for module in modules]
        self._children = [module._modules for module in modules]
        self._hooks: list[dict[int, Any]] = [
            everywhere._global_forward_pre_hooks,
            everywhere._global_forward_hooks,
        ]
        for module in modules:
            self._hooks += [module._forward_pre_hooks, module._forward_hooks]
        self._holders: list[Any] = [module._parameters for module in modules]
        self._holders += [module._buffers for module in modules if not moves_with_length(module)]
        self._loose: list[tuple[str, dict[str, Any]]] = []
        for module in modules:
            self._loose += [(name, vars(module)) for name, _ in loose_tensors(module)]
            self._loose += [(name, module._buffers) for name in first_tables(module)]
        # Weak, so that weights that were replaced can be freed; dead once the memory may be reused.
        self._tensors = [weakref.ref(tensor) for tensor in self._held()]
        self._plain: list[tuple[Callable[[dict[str, Any]], object], dict[str, Any]]] = []
        self._nested: list[tuple[str, dict[str, Any]]] = []
        for module in modules:
            self._add(chain(settings(module), others(module)), vars(module))
            if noisy(module):
                self._add([("training", True)], vars(module))
        for config in configs(model):
            private = ((name, None) for name in PRIVATE_OF_CONFIG if name in vars(config))
            self._add(chain(of_config(config), private), vars(config))

    def _add(self, named: Iterable[tuple[str, object]], kept: dict[str, Any]) -> None:
        plain: list[str] = []
        for name, _ in named:
            value = kept.get(name)
            if value is None or isinstance(value, bool | int | float | str):
                plain.append(name)
            else:
                self._nested.append((name, kept))
        if plain:
            self._plain.append((itemgetter(*plain), kept))

    def _held(self) -> Iterator[Any]:
        values = chain.from_iterable(map(dict.values, self._holders))
        yield from (tensor for tensor in values if tensor is not None)
        loose = (kept.get(name) for name, kept in self._loose)
        yield from (value for value in loose if isinstance(value, torch.Tensor))

    def look(self) -> Look:
        """Reads these places now."""
        children = chain.from_iterable(map(dict.values, self._children))
        tensors = list(self._held())
        same = [ref() is tensor for ref, tensor in zip(self._tensors, tensors, strict=False)]
        states = map(state_of, tensors)
        try:
            settings: list[object] = [get(kept) for get, kept in self._plain]
            settings += [frozen(kept[name]) for name, kept in self._nested]
        except KeyError:  # one is gone
            settings = []
        hooks = chain.from_iterable(map(dict.values, self._hooks)) if any(self._hooks) else ()
        return Look(
            (*map(type, self._modules), *map(len, self._kept), *map(id, children)),
            (len(tensors), all(same) and len(same) == len(self._tensors), *states),
            tuple(settings),
            tuple(map(id, hooks)),
        )

    def has_changed(self, since: Look) -> bool:
        """Whether a look gives anything else than an earlier one."""
        try:
            return self.look() != since
        except (RuntimeError, ValueError):  # a number has become an array, which is not comparable
            return True
