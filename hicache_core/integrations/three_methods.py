"""Classes with ``get(key)``, ``exists(key)`` and ``set(key, value)`` and no more of SGLang's."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class ThreeMethods:
    """Calls such a class as if it had SGLang's signatures.

    A value is a flat uint8 tensor on the CPU, which the class may keep. It may answer with a tensor
    or with anything that is bytes-like. ``None`` and ``KeyError`` are a miss. A ``set`` that
    returns nothing has stored the value.

    Attributes:
        foreign: the object of the class.
    """

    def __init__(self, foreign_class: type, config: object) -> None:
        """Makes an object of the class.

        Args:
            foreign_class: made with ``(storage_config, {})`` if it takes two arguments, as SGLang
                does, otherwise without any.
            config: what SGLang calls ``storage_config``.
        """
        self.foreign = _made(foreign_class, config)

    def get(self, key: str, _target: object, _sizes: object) -> Any:
        """Returns a value; None if there is none.

        Args:
            key: under which it is stored.
            _target: SGLang's; not needed, as is ``_sizes``.
            _sizes: likewise.
        """
        try:
            value = self.foreign.get(key)
        except KeyError:
            return None
        if isinstance(value, bytes | bytearray | memoryview):
            return torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return value

    def exists(self, key: str) -> Any:
        """Returns what the class says."""
        return self.foreign.exists(key)

    def set(self, key: str, value: torch.Tensor, _target: object, _sizes: object) -> Any:
        """Stores a value.

        Args:
            key: under which.
            value: flat, uint8.
            _target: SGLang's; not needed, as is ``_sizes``.
            _sizes: likewise.

        Returns:
            What the class says; True if it says nothing.
        """
        answer = self.foreign.set(key, value)
        return True if answer is None else answer

    def close(self) -> None:
        """Closes the object if it can be closed."""
        if callable(getattr(self.foreign, "close", None)):
            self.foreign.close()


def _made(foreign_class: type, config: object) -> Any:
    try:
        inspect.signature(foreign_class).bind(config, {})
    except (TypeError, ValueError):  # another number of arguments, or a class without a signature
        return foreign_class()
    return foreign_class(config, {})
