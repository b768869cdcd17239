"""Token ids as transformers' tokenizers and users give them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hicache_core.errors import InvalidTokens

Tokens = Sequence[int] | torch.Tensor
"""One prompt: a sequence of ints, or a tensor of shape (n_tokens,) or (1, n_tokens)."""


def token_list(tokens: Tokens) -> list[int]:
    """Token ids as a list; there may be a leading dimension of 1.

    Raises:
        InvalidTokens: there are none, or more than one prompt.
    """
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.tolist()
    while len(tokens) and isinstance(tokens[0], list | tuple):
        if len(tokens) > 1:
            raise InvalidTokens(f"one prompt at a time; found a batch of {len(tokens)}")
        tokens = tokens[0]
    if not len(tokens):
        raise InvalidTokens("the prompt is empty: there is no token to answer to")
    return list(tokens)
