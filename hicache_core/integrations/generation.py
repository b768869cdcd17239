"""What a cached ``generate`` needs of transformers beside the cache itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, StoppingCriteria


class AfterEachStep(StoppingCriteria):
    """Calls a function between two forward passes of a ``generate``; never stops it."""

    def __init__(self, call: Callable[[], None]) -> None:
        """Calls nothing yet.

        Args:
            call: called on the thread of the ``generate``.
        """
        self._call = call

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Calls it; for no sequence, the answer is at its end."""
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def from_its_end(model: Any, past: Cache) -> Iterator[None]:
    """Lets ``generate`` go on from the end of ``past`` for a model that takes it by another name.

    transformers skips the tokens of a cache only if the model's forward calls it
    ``past_key_values``. Mamba 2, where it is ``cache_params``, would be shown all of it again.

    Args:
        model: whose ``generate`` runs inside.
        past: the cache that it is given.
    """
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def skipping(input_ids: torch.Tensor, *args: Any, **arguments: Any) -> Any:
        if arguments.get("is_first_iteration") and arguments.get("cache_params") is past:
            arguments["next_sequence_length"] = input_ids.shape[1] - past.get_seq_length()
        return prepare(input_ids, *args, **arguments)

    model.prepare_inputs_for_generation = skipping
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation
