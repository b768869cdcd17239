"""Tokens for the requests of a trace: equal where the trace says so, different elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from hicache_core.bench.traces import TraceRequest
from hicache_core.kv.keys import TOKEN_NBYTES

_FIRST_ANSWER = 1 << 31
"""Token ids from here on occur in answers only."""


class Prompts:
    """The packed token ids of prompts and answers.

    A block of a trace is one id over and over, which no other block has. A word of a text is a
    token. An answer is one id that nothing else has, except where the next request of the session
    begins with prompt and answer, as in a trace with texts.

    Attributes:
        successors: for each request of a session the next one.
    """

    def __init__(self, requests: Sequence[TraceRequest]) -> None:
        """Numbers the blocks and words of ``requests``, which are scaled already."""
        self._requests = requests
        self.successors = _successors(requests)
        names = dict.fromkeys(name for request in requests for name in _names(request))
        self._ids = {name: n.to_bytes(TOKEN_NBYTES, "little") for n, name in enumerate(names)}

    def prompt(self, n: int) -> bytes:
        """The prompt of request ``n``."""
        request = self._requests[n]
        ids = [self._ids[name] for name in _names(request)]
        if request.text:
            return b"".join(ids)
        blocks = b"".join([one * request.block_tokens for one in ids])
        return blocks[: request.input_length * TOKEN_NBYTES]

    def answer(self, n: int, n_tokens: int) -> bytes:
        """The first ``n_tokens`` of the answer to request ``n``."""
        said = b""
        if self._requests[n].text and n in self.successors:
            before, after = self.prompt(n), self.prompt(self.successors[n])
            if after.startswith(before):
                said = after[len(before) : len(before) + n_tokens * TOKEN_NBYTES]
        n_new = n_tokens - len(said) // TOKEN_NBYTES
        return said + (_FIRST_ANSWER + n).to_bytes(TOKEN_NBYTES, "little") * n_new


def _names(request: TraceRequest) -> Sequence[str]:
    return [f"word/{word}" for word in request.text.split()] if request.text else request.blocks


def _successors(requests: Sequence[TraceRequest]) -> dict[int, int]:
    """For each request of a session the next one."""
    found: dict[int, int] = {}
    last: dict[str, int] = {}
    for n, request in enumerate(requests):
        if request.session:
            if request.session in last:
                found[last[request.session]] = n
            last[request.session] = n
    return found
