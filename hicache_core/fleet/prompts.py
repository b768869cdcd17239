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
        self._ids: dict[str, bytes] = {}
        self.successors = _successors(requests)
        for request in requests:  # now, so that the ids do not depend on who asks first
            for name in _names(request):
                self._id(name)

    def prompt(self, n: int) -> bytes:
        """The prompt of request ``n``."""
        request = self._requests[n]
        if request.text:
            return b"".join(map(self._id, _names(request)))
        blocks = (self._id(name) * request.block_tokens for name in request.blocks)
        return b"".join(blocks)[: request.input_length * TOKEN_NBYTES]

    def answer(self, n: int, n_tokens: int) -> bytes:
        """The first ``n_tokens`` of the answer to request ``n``."""
        said = b""
        if self._requests[n].text and n in self.successors:
            before, after = self.prompt(n), self.prompt(self.successors[n])
            if after.startswith(before):
                said = after[len(before) : len(before) + n_tokens * TOKEN_NBYTES]
        n_new = n_tokens - len(said) // TOKEN_NBYTES
        return said + (_FIRST_ANSWER + n).to_bytes(TOKEN_NBYTES, "little") * n_new

    def _id(self, name: str) -> bytes:
        found = self._ids.get(name)
        if found is None:
            found = self._ids[name] = len(self._ids).to_bytes(TOKEN_NBYTES, "little")
        return found


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
