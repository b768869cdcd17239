"""The log of requests: a line for each that has ended."""

from __future__ import annotations

import logging

from hicache_core.engine.request import Output

log = logging.getLogger(__name__)


def log_request(name: str, last: Output) -> None:
    """Logs where the prompt of a request came from, what it brought, and how long that took.

    Args:
        name: what the client calls it; shown quoted, since clients choose it.
        last: its last output.
    """
    cached, times = last.cached, last.times
    log.info(
        "request %r: %s; prompt %d tokens: device %d, host %d, storage %d, computed %d; "
        "answer %d tokens; first token %s, total %s",
        name,
        last.finish_reason,
        last.prompt_tokens,
        cached.device,
        cached.host,
        cached.storage,
        last.prompt_tokens - cached.total,
        last.completion_tokens,
        _seconds(times.arrived, times.first_token),
        _seconds(times.arrived, times.finished),
    )


def _seconds(start: float, end: float) -> str:
    return f"{end - start:.3f} s" if end else "none"
