"""TransferCounts: what became of the requests that two nodes share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TransferCounts:
    """Counted by the engine's thread, read by any.

    Attributes:
        sent: requests whose KV reached the decode node.
        received: requests whose KV came from a prefill node.
        recomputed: requests that the decode node computed after a transfer failed.
        failed: transfers that failed, on this side.
        nbytes: of rows that were moved.
        last_error: of the last transfer that failed; empty for none.
    """

    sent: int = 0
    received: int = 0
    recomputed: int = 0
    failed: int = 0
    nbytes: int = 0
    last_error: str = ""
