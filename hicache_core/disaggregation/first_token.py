"""FirstToken: what a prefill node sends with the rows."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hicache_core.errors import TransferError
from hicache_core.types import CachedTokens


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The note of a transfer.

    Attributes:
        token: the first of the answer.
        cached: tokens of the prompt that the prefill node had cached.
    """

    token: int
    cached: CachedTokens

    def pack(self) -> bytes:
        """As a note."""
        tiers = [self.cached.device, self.cached.host, self.cached.storage]
        return json.dumps({"token": self.token, "cached": tiers}).encode()

    @classmethod
    def unpack(cls, note: bytes, n_prompt: int, vocabulary: int) -> FirstToken:
        """Reads a note.

        Args:
            note: from a peer.
            n_prompt: tokens of the prompt.
            vocabulary: number of token ids.

        Raises:
            TransferError: the note is malformed; the message does not quote it.
        """
        try:
            fields = json.loads(note)
            token = fields["token"]
            device, host, storage = fields["cached"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TransferError(
                f"the prefill node sent no first token: {type(error).__name__}"
            ) from error
        if not all(type(n) is int and n >= 0 for n in (token, device, host, storage)):
            raise TransferError("the prefill node sent a first token that is not a number")
        if token >= vocabulary:
            raise TransferError(
                f"the prefill node sent a first token that is none of this model's {vocabulary}"
            )
        if device + host + storage > n_prompt:
            raise TransferError(
                f"the prefill node had more cached, it says, than the prompt's {n_prompt} tokens"
            )
        return cls(token, CachedTokens(device, host, storage))
