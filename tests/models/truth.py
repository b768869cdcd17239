"""What a model answers without any cache of ours, and how far other answers are from that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from tests.models.findings import TOLERANCE
from tests.models.tiny import VOCABULARY

N_NEW = 12


@dataclass(frozen=True, slots=True)
class Answer:
    """New tokens, and the logits that each was chosen from."""

    tokens: list[int]
    logits: list[torch.Tensor]


class Tap(LogitsProcessor):
    """Records the logits that a ``generate`` chooses from."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(scores[0].float().clone())
        return scores


class Truth:
    """The answers of ``model.generate``, each computed once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[tuple[int, ...], Answer] = {}

    def of(self, prompt: Sequence[int], n_new: int = N_NEW) -> Answer:
        """The greedy answer to a prompt."""
        key = (*prompt, -n_new)
        if key not in self._known:
            tap, ids = Tap(), torch.tensor([list(prompt)])
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_new,
                do_sample=False,
                logits_processor=[tap],
            )
            self._known[key] = Answer(output[0, len(prompt) :].tolist(), tap.logits)
        return self._known[key]

    def moved_by(self, prompt: Sequence[int], at: int) -> float:
        """How far the next logits move when the token at a place is another one."""
        changed = list(prompt)
        changed[at] = prompt_of(1, seed=at)[0]
        (before,), (after,) = (self.of(each, 1).logits for each in (prompt, changed))
        return _distance(after, before)


def prompt_of(n_tokens: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens of any tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(12, VOCABULARY - 12, (n_tokens,), generator=generator).tolist()


def apart(got: Answer, want: Answer) -> float:
    """The largest difference of logits, as a part of the largest, while the tokens are the same.

    At the first other token: infinity, unless it was as probable as the expected one.
    """
    if not len(got.tokens) == len(got.logits) == len(want.tokens):
        return math.inf
    worst = 0.0
    for n, logits in enumerate(want.logits):
        worst = max(worst, _distance(got.logits[n], logits))
        if got.tokens[n] != want.tokens[n]:
            best, scale = logits.max(), logits[logits.isfinite()].abs().max()
            is_tie = best - logits[got.tokens[n]] < TOLERANCE * scale
            return worst if is_tie else math.inf
    return worst


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    known = want.isfinite()
    if got.shape != want.shape or not torch.equal(got.isfinite(), known):
        return math.inf
    return float((got[known] - want[known]).abs().max() / want[known].abs().max())
