"""The format of KV events on the wire, as SGLang 0.5.23 and vLLM 0.32 send it and routers read it.

A message has three frames: topic, sequence number (u64, big-endian), payload. The payload is the
msgpack array ``[ts, events, dp_rank]``; each event is a map whose ``type`` names it:

=================  =============================================================================
``BlockStored``    ``block_hashes``, ``parent_block_hash``, ``token_ids``, ``block_size``,
                   ``lora_id``, ``medium``, ``lora_name``; in a namespace ``cache_salt``,
                   ``extra_keys``; of a group of layers ``extra_keys``, ``group_idx``,
                   ``kv_cache_spec_kind``, ``kv_cache_spec_sliding_window``
``BlockRemoved``   ``block_hashes``, ``medium``; of a group of layers ``group_idx``
``AllBlocksCleared``
=================  =============================================================================

or, for readers of the older form, the array of its type and of the same values in this order,
without ``cache_salt``, which ``extra_keys`` has too.

A hash is the first 8 bytes of the page's digest as a signed big-endian integer. Digests chain the
namespace (salt, key, adapter), so equal tokens of two tenants have two hashes. A router that hashes
the tokens itself needs the names as well: see ``_names``. ``lora_id`` is null: readers want it
there, and ``lora_name`` says it. Full pages have no group, so their events are those of a model
with full attention only.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import msgpack

from hicache_core.kv.keys import DIGEST_NBYTES, TOKEN_NBYTES
from hicache_core.kv.spec import GroupKind
from hicache_core.observe.journal import PageRun
from hicache_core.types import Namespace, Tier

MEDIUM = {Tier.DEVICE: "GPU", Tier.HOST: "CPU_PINNED", Tier.STORAGE: "EXTERNAL"}
KIND = {GroupKind.WINDOW: "sliding_window", GroupKind.STATE: "mamba"}
"""vLLM's names of the kinds of groups."""
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
        yield replace(run, parent=parent, digests=digests, tokens=tokens)
        parent = digests[-DIGEST_NBYTES:]


def stored(tier: Tier, run: PageRun, namespace: Namespace | None = None) -> Event:
    """The event that ``tier`` has the pages of ``run`` from now on.

    Args:
        tier: the tier.
        run: the pages.
        namespace: the namespace that has the seed ``run.seed``; None if it is not known.
    """
    hashes = block_hashes(run.digests)
    tokens = array("I", bytes(run.tokens))
    if sys.byteorder == "big":
        tokens.byteswap()
    is_first = run.parent in (b"", run.seed)
    event: Event = {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None if is_first else _hash(run.parent),
        "token_ids": tokens.tolist(),
        "block_size": len(tokens) // len(hashes),
        "lora_id": None,
        "medium": MEDIUM[tier],
        "lora_name": None,
    }
    if run.seed:
        event |= _names(run.seed, namespace, len(hashes), is_first=is_first)
    if run.group is not None:
        event.setdefault("extra_keys", None)  # an array has the fields of a group after it
        event["group_idx"] = run.group_index
        event["kv_cache_spec_kind"] = KIND[run.group.kind]
        event["kv_cache_spec_sliding_window"] = run.group.window or None
    return event


def _names(seed: bytes, namespace: Namespace | None, n_blocks: int, *, is_first: bool) -> Event:
    """The fields that tell a router the namespace: those of SGLang, and ``extra_keys`` of vLLM.

    Routers look prompts up by salt and adapter, but not by ``extra_key``. So the blocks of a
    request with an ``extra_key``, or with an unknown namespace, get the seed in hex as their salt.
    A router then never takes them for blocks of the plain prompt.
    """
    adapter = None if namespace is None else namespace.lora_id
    salt: str | None = seed.hex()
    if namespace is not None and namespace.extra_key is None:
        salt = namespace.cache_salt
    names: Event = {"lora_name": adapter}
    if salt is not None:
        names["cache_salt"] = salt
    keys = [[] if adapter is None else [adapter] for _ in range(n_blocks)]
    if is_first and salt is not None:
        keys[0].append(salt)
    if any(keys):
        names["extra_keys"] = [key or None for key in keys]
    return names


def removed(tier: Tier, run: PageRun) -> Event:
    """The event that ``tier`` no longer has the pages."""
    event: Event = {
        "type": "BlockRemoved",
        "block_hashes": block_hashes(run.digests),
        "medium": MEDIUM[tier],
    }
    return event if run.group is None else event | {"group_idx": run.group_index}


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
    return _packed([timestamp, events, dp_rank])


def payload_of_arrays(timestamp: float, events: Sequence[Event], dp_rank: int) -> bytes:
    """As :func:`payload`, with each event as an array.

    Args:
        timestamp: seconds since 1970.
        events: the events of the batch.
        dp_rank: data-parallel rank of the cache.
    """
    arrays = [[v for k, v in event.items() if k != "cache_salt"] for event in events]
    return _packed([timestamp, arrays, dp_rank])


def _packed(batch: Sequence[object]) -> bytes:
    packed = msgpack.packb(batch)
    assert isinstance(packed, bytes)
    return packed


PACKERS = {"map": payload, "array": payload_of_arrays}
"""The functions that pack a batch, by the setting ``format``."""
