"""What the explainer is told of a match."""

from __future__ import annotations

from typing import NamedTuple

from hicache_core.controller.explain import Hits
from hicache_core.controller.parts import Parts
from hicache_core.kv.keys import TOKEN_NBYTES, page_digests
from hicache_core.radix.results import Match
from hicache_core.types import Namespace


class Asked(NamedTuple):
    """Whose prompt was matched.

    Attributes:
        request_id: whose.
        n_tokens: of the whole prompt.
        namespace: the request's.
    """

    request_id: str
    n_tokens: int
    namespace: Namespace


def record_match(parts: Parts, asked: Asked, tokens: bytes, match: Match) -> None:
    """Lets the explainer know where a request's packed ``tokens`` were found. Owner thread only."""
    if parts.explainer is None:
        return
    page_nbytes = parts.page_size * TOKEN_NBYTES
    start = match.n_tokens * TOKEN_NBYTES
    page = tokens[start : start + page_nbytes]
    is_not_asked = not tokens and asked.n_tokens > parts.page_size

    def missed_page() -> bytes:
        return page_digests(page, parts.page_size, parts.tree.last_digest(match.node))

    parts.explainer.matched(
        asked.request_id,
        Hits(match.n_device_tokens, match.n_host_tokens, asked.n_tokens),
        missed_page if len(page) == page_nbytes else None,
        None if is_not_asked else page_digests(tokens[:page_nbytes], parts.page_size),
        asked.namespace,
    )
