"""Sampler: which token comes next, and whether it is the last."""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection

import torch

from hicache_core.engine.logits_rules import LogitsRules
from hicache_core.engine.request import SamplingParams
from hicache_core.errors import ConfigError


def check_sampling(params: SamplingParams) -> None:
    """Raises ConfigError: names the parameter that is out of range."""
    rules = {
        "max_new_tokens": (params.max_new_tokens >= 0, "at least 0"),
        "temperature": (0 <= params.temperature < float("inf"), "at least 0"),
        "top_p": (0 < params.top_p <= 1, "above 0 and at most 1"),
        "top_k": (params.top_k == -1 or params.top_k >= 1, "at least 1, or -1 for all"),
        "min_new_tokens": (
            0 <= params.min_new_tokens <= params.max_new_tokens,
            "from 0 to max_new_tokens",
        ),
        "stop": (all(params.stop), "without empty texts"),
    }
    for name, (is_well, allowed) in rules.items():
        if not is_well:
            raise ConfigError(f"{name} is {getattr(params, name)!r}; it must be {allowed}")


class Sampler:
    """Chooses the tokens of one request.

    The choice depends on the logits, the seed and the position in the answer, where the model has
    rules also on the tokens before it, and on nothing else: neither on what runs beside, nor on how
    often the request had to wait.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        eos_token_ids: Collection[int],
        rules: LogitsRules | None = None,
    ) -> None:
        """Keeps its arguments.

        Args:
            params: of the request.
            seed: what chance comes from; ``params.seed``, or any number where that is None.
            eos_token_ids: tokens that end any answer, unless ``params.ignore_eos``.
            rules: of the model; none by default.
        """
        self._rules = rules or LogitsRules()
        self._params = params
        self._seed = seed
        own = () if params.ignore_eos else eos_token_ids
        self._ends = frozenset(own).union(params.stop_token_ids)

    def choose(self, logits: torch.Tensor, position: int, tokens: array[int] | None = None) -> int:
        """The token at ``position`` of the answer.

        Args:
            logits: (vocabulary,), float32; not changed.
            position: of the token in the answer, from 0.
            tokens: prompt and answer so far, an array of type I, which the model's rules need;
                None to choose without these rules.
        """
        params = self._params
        if tokens is not None:
            logits = self._rules.applied(logits, tokens, position)
        if position < params.min_new_tokens and self._ends:
            logits = logits.clone()
            known = [token for token in self._ends if 0 <= token < len(logits)]
            logits[known] = -float("inf")
        if params.temperature == 0 or params.top_k == 1:
            return int(logits.argmax())
        return self._draw(logits, random.Random(f"{self._seed}:{position}").random())

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends the answer."""
        return token in self._ends

    def _draw(self, logits: torch.Tensor, chance: float) -> int:
        """The token at ``chance`` of the way through those that top_k and top_p leave."""
        params = self._params
        scaled = logits.double().cpu() / params.temperature
        order = torch.argsort(scaled, descending=True, stable=True)
        if params.top_k > 0:
            order = order[: params.top_k]
        sums = torch.softmax(scaled[order], 0).cumsum(0)
        n_kept = int((sums < params.top_p).sum()) + 1
        sums = sums[:n_kept]
        at = int(torch.searchsorted(sums, chance * float(sums[-1]), right=True))
        return int(order[min(at, len(sums) - 1)])
