"""What the explainer is told of a match."""

from __future__ import annotations

from hicache_core.controller.explain import Hits
from hicache_core.controller.parts import Parts
from hicache_core.page_keys import TOKEN_NBYTES, page_digests
from hicache_core.radix.results import Match
from hicache_core.types import Namespace


def record_match(
    parts: Parts, request_id: str, tokens: bytes, match: Match, namespace: Namespace
) -> None:
    """Lets the explainer know where a request's packed ``tokens`` were found. Owner thread only."""
    if parts.explainer is None:
        return
    page_nbytes = parts.page_size * TOKEN_NBYTES
    start = match.n_tokens * TOKEN_NBYTES
    page = tokens[start : start + page_nbytes]

    def missed_page() -> bytes:
        return page_digests(page, parts.page_size, parts.tree.last_digest(match.node))

    parts.explainer.matched(
        request_id,
        Hits(match.n_device_tokens, match.n_host_tokens, len(tokens) // TOKEN_NBYTES),
        missed_page if len(page) == page_nbytes else None,
        page_digests(tokens[:page_nbytes], parts.page_size),
        namespace,
    )
