"""LogprobRecord: the log probabilities of one request, from the logits of its forwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hicache_core.engine.request import TokenLogprobs, WantedLogprobs
from hicache_core.errors import ConfigError

_BLOCK = 64
"""Rows whose log probabilities are in memory at once, as float32."""


class LogprobRecord:
    """Collects log probabilities between two outputs of a request. Owner thread only.

    The row of a token says how probable each token after it is, so the last row of a prompt is
    about the answer, and the first token of a prompt has no log probability.

    ::

        rows of the prompt | not wanted | known | missing |  last   |
                           0          start    next      n - 1      n
    """

    def __init__(self, wanted: WantedLogprobs, prompt: Sequence[int]) -> None:
        """Nothing is known yet.

        Args:
            wanted: of the request.
            prompt: its tokens.

        Raises:
            ConfigError: ``prompt_start`` is outside the prompt, or ``top_n`` is negative.
        """
        start = wanted.prompt_start
        if wanted.top_n < 0:
            raise ConfigError(f"top_n is {wanted.top_n}; it must be at least 0")
        if start is not None and not 0 <= start < len(prompt):
            raise ConfigError(
                f"prompt_start is {start}; it must be a position in the prompt, 0 to "
                f"{len(prompt) - 1}"
            )
        self._top_n = wanted.top_n
        self._prompt = prompt
        self._n_rows = len(prompt) - 1  # those about a token of the prompt
        self._next = self._n_rows if start is None else start
        self._of_prompt = [] if start is None else [TokenLogprobs(prompt[start], None, ())]
        self._of_answer: list[TokenLogprobs] = []

    def n_reusable(self, n_tokens: int) -> int:
        """How many of the leading ``n_tokens`` of the sequence need no logits of their own."""
        return n_tokens if self._next == self._n_rows else self._next

    def n_rows(self, start: int, stop: int) -> int:
        """Rows whose logits are needed of a forward, the last ones of it; at least one.

        Args:
            start: position of the first token of the forward.
            stop: position after the last one.
        """
        return 1 if self._next == self._n_rows else max(1, stop - max(start, self._next))

    def take_rows(self, stop: int, rows: torch.Tensor) -> None:
        """Takes the logits of a forward of the prompt.

        Args:
            stop: position after the last token of the forward.
            rows: of its last tokens, as many as ``n_rows`` says; (n, vocabulary).
        """
        first, end = stop - len(rows), min(stop, self._n_rows)
        while self._next < end:
            until = min(self._next + _BLOCK, end)
            tokens = self._prompt[self._next + 1 : until + 1]
            self._of_prompt += self._found(rows[self._next - first : until - first], tokens)
            self._next = until

    def take_token(self, token: int, row: torch.Tensor) -> None:
        """Takes the next token of the answer, and the logits from which it was chosen.

        Args:
            token: its id.
            row: the model's own logits, (vocabulary,).
        """
        self._of_answer += self._found(row[None], [token])

    def taken(self) -> tuple[tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]:
        """What is new since the last call: of the prompt, and of the answer."""
        new = tuple(self._of_prompt), tuple(self._of_answer)
        self._of_prompt, self._of_answer = [], []
        return new

    def _found(self, rows: torch.Tensor, tokens: Sequence[int]) -> list[TokenLogprobs]:
        """Of one token for each row."""
        logprobs = torch.log_softmax(rows.float(), -1)
        index = torch.tensor(list(tokens), dtype=torch.int64, device=rows.device)
        own = logprobs.gather(1, index[:, None])[:, 0].tolist()
        top = logprobs.topk(min(self._top_n, logprobs.shape[1]), -1)
        return [
            TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, ids, values in zip(
                tokens, own, top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
