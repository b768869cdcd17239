"""The format of KV events on the wire: what SGLang 0.5.23 and vLLM 0.32 send and routers read.

A message has three frames: topic, sequence number (u64, big-endian), payload. The payload is the
msgpack array ``[ts, events, dp_rank]``; each event is a map whose ``type`` names it:

=================  =============================================================================
``BlockStored``    ``block_hashes``, ``parent_block_hash``, ``token_ids``, ``block_size``,
                   ``lora_id``, ``medium``, ``lora_name``
``BlockRemoved``   ``block_hashes``, ``medium``
``AllBlocksCleared``
=================  =============================================================================

A hash is the first 8 bytes of the page's digest as a signed big-endian integer. Digests chain the
namespace (salt, adapter), so equal tokens of two tenants have two hashes. ``lora_id`` and
``lora_name`` are null: readers want them there, and what they separate is in the hash already.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgpack

from hicache_core.controller.journal import PageRun
from hicache_core.page_keys import DIGEST_NBYTES, TOKEN_NBYTES
from hicache_core.types import Tier

MEDIUM = {Tier.DEVICE: "GPU", Tier.HOST: "CPU_PINNED", Tier.STORAGE: "EXTERNAL"}
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
"""The sequence number of the message that ends a replay."""

Event: TypeAlias = dict[str, object]

CLEARED: Event = {"type": "AllBlocksCleared"}


def pieces(run: PageRun, max_tokens: int) -> Iterator[PageRun]:
    """``run`` in consecutive runs of at most ``max_tokens`` tokens, or of one page."""
    n_pages = len(run.digests) // DIGEST_NBYTES
    page_nbytes = len(run.tokens) // n_pages
    step = max(1, max_tokens * TOKEN_NBYTES // page_nbytes)
    parent = run.parent
    for start in range(0, n_pages, step):
        digests = run.digests[start * DIGEST_NBYTES : (start + step) * DIGEST_NBYTES]
        tokens = run.tokens[start * page_nbytes : (start + step) * page_nbytes]
        yield PageRun(parent, digests, tokens, run.seed)
        parent = digests[-DIGEST_NBYTES:]


def stored(tier: Tier, run: PageRun) -> Event:
    """The event that ``tier`` has the pages of ``run`` from now on."""
    hashes = block_hashes(run.digests)
    tokens = array("I", bytes(run.tokens))
    if sys.byteorder == "big":
        tokens.byteswap()
    is_first = run.parent in (b"", run.seed)
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None if is_first else _hash(run.parent),
        "token_ids": tokens.tolist(),
        "block_size": len(tokens) // len(hashes),
        "lora_id": None,
        "medium": MEDIUM[tier],
        "lora_name": None,
    }


def removed(tier: Tier, run: PageRun) -> Event:
    """The event that ``tier`` has them no more."""
    return {
        "type": "BlockRemoved",
        "block_hashes": block_hashes(run.digests),
        "medium": MEDIUM[tier],
    }


def block_hashes(digests: bytes) -> list[int]:
    """The hashes of packed digests, one for each 32 bytes."""
    return [_hash(digests[at : at + 8]) for at in range(0, len(digests), DIGEST_NBYTES)]


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def payload(timestamp: float, events: Sequence[Event], dp_rank: int) -> bytes:
    """One batch.

    Args:
        timestamp: seconds since 1970.
        events: in the order in which they happened.
        dp_rank: data-parallel rank of the sender.
    """
    packed = msgpack.packb([timestamp, events, dp_rank])
    assert isinstance(packed, bytes)
    return packed
