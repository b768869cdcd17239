"""The reference: a plain model without any cache of ours, greedily."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hicache_core.engine.model import LoadedModel


def plain_answer(loaded: LoadedModel, prompt: Sequence[int], n_new: int) -> list[int]:
    """``n_new`` tokens, whether or not the model would end before."""
    loaded.model.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer
