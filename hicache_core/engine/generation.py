"""Greedy decoding with a clock: the tokens, and the time to the first of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model answered.

    Attributes:
        tokens: the new tokens, end of sequence included.
        first_logits: logits of the first new token, shape (vocabulary,), float32.
        ttft_s: from ``started_at`` to the first new token.
        total_s: from ``started_at`` to the last.
    """

    tokens: tuple[int, ...]
    first_logits: torch.Tensor
    ttft_s: float
    total_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second after the first one; 0.0 for an answer of one token."""
        elapsed = self.total_s - self.ttft_s
        return (len(self.tokens) - 1) / elapsed if elapsed > 0 else 0.0


class _FirstToken(BaseStreamer):
    """Notes when generate hands out its first new token; the prompt comes before it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._n_puts = 0
        self.at_s = 0.0

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - only the time counts
        self._n_puts += 1
        if self._n_puts == 2:
            self.at_s = self._clock()

    def end(self) -> None:
        """Nothing is left to do."""


def generate_greedy(
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    past: Any = None,
    started_at: float | None = None,
    clock: Clock = time.perf_counter,
) -> Generation:
    """Answers ``prompt`` with the most probable token each time.

    Args:
        model: a transformers ``…ForCausalLM``.
        prompt: token ids, at least one more than ``past`` holds.
        max_new_tokens: where to stop, unless the model ends before.
        past: a transformers ``Cache`` that holds a prefix of the prompt; a new one by default.
        started_at: when the request began, by ``clock``; now by default.
        clock: seconds, monotonic.
    """
    first = _FirstToken(clock)
    started_at = clock() if started_at is None else started_at
    ids = torch.tensor([list(prompt)], dtype=torch.int64, device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        past_key_values=past,
        streamer=first,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ended_at = clock()
    return Generation(
        tokens=tuple(output.sequences[0, len(prompt) :].tolist()),
        first_logits=output.logits[0][0].float(),
        ttft_s=first.at_s - started_at,
        total_s=ended_at - started_at,
    )
