"""The result of a load: its records, their percentiles, and the hit tokens by tier."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hicache_core.bench.client import TIERS, Reply


@dataclass(frozen=True, slots=True)
class Record:
    """One finished request.

    Attributes:
        client: number of the client; for a replay, the number of the request in the trace.
        round: number of the request of this client, from 0.
        sent_s: seconds from the start of the run until it was sent.
        prompt_words: words in its prompt.
        reply: the answer.
    """

    client: int
    round: int
    sent_s: float
    prompt_words: int
    reply: Reply


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value such that at least ``share`` of all values are not above it; or None.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5)
        2.0
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def summary(
    records: Sequence[Record],
    elapsed_s: float,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """The summary of a run, as JSON values.

    Args:
        records: all requests.
        elapsed_s: seconds of the whole run.
        before, after: snapshots of the server's cache around the run; empty if there is none.

    Returns:
        ``hit_tokens_source`` tells where the hit tokens by tier come from: ``replies``, ``cache``
        (growth of its counters, which count other requests too, and a preempted request again),
        or nothing.
    """
    good = [record.reply for record in records if not record.reply.error]
    hits, source = _hits(good, before, after)
    n_output = sum(reply.output_tokens for reply in good)
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "errors": sorted({record.reply.error for record in records if record.reply.error})[:5],
        "elapsed_s": elapsed_s,
        "ttft_s": _spread([reply.ttft_s for reply in good if reply.ttft_s is not None]),
        "latency_s": _spread([reply.latency_s for reply in good]),
        "requests_per_s": len(good) / elapsed_s,
        "output_tokens_per_s": n_output / elapsed_s,
        "prompt_tokens": sum(reply.prompt_tokens for reply in good),
        "output_tokens": n_output,
        "cached_tokens": sum(reply.cached_tokens for reply in good),
        "hit_tokens": hits,
        "hit_tokens_source": source,
        "rounds": _rounds(records),
    }


def as_json(record: Record) -> dict[str, Any]:
    """A record without its text."""
    values = asdict(record)
    values["reply"].pop("text")
    return values


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": sum(values) / len(values) if values else None,
        "p50": percentile(values, 0.5),
        "p90": percentile(values, 0.9),
        "p99": percentile(values, 0.99),
        "max": max(values, default=None),
    }


def _hits(
    replies: Sequence[Reply], before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[dict[str, int], str]:
    if any(reply.cached for reply in replies):
        return {tier: sum(r.cached.get(tier, 0) for r in replies) for tier in TIERS}, "replies"
    if before.get("hit_tokens") is not None and after.get("hit_tokens") is not None:
        old, new = before["hit_tokens"], after["hit_tokens"]
        return {tier: new.get(tier, 0) - old.get(tier, 0) for tier in TIERS}, "cache"
    return {}, ""


def _rounds(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The summary of each round; later rounds should find more in the cache."""
    rounds: dict[int, list[Reply]] = defaultdict(list)
    for record in records:
        if not record.reply.error:
            rounds[record.round].append(record.reply)
    return [
        {
            "round": n,
            "requests": len(replies),
            "ttft_s": _spread([reply.ttft_s for reply in replies if reply.ttft_s is not None]),
            "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
            "cached_tokens": sum(reply.cached_tokens for reply in replies),
        }
        for n, replies in sorted(rounds.items())
    ]
