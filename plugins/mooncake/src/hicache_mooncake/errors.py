"""The table of Mooncake's negative codes: a miss, a dropped write, or a failure.

A code that is not in it becomes a ``BackendError`` that names it.
"""

from __future__ import annotations

from hicache_core.errors import BackendError, BackendTimeout, BackendUnavailable

OK = 0
INVALID_PARAMS = -600
NOT_READY = -703
OBJECT_NOT_FOUND = -704
ALREADY_EXISTS = -705

MISSES = {
    -600: "wrong_size",  # the page is smaller than the object
    -701: "invalid_replicas",
    -702: "invalid_replicas",
    -703: "not_ready",  # still being written
    -704: "missing",
    -707: "leases_expired",  # the bytes may have been overwritten while they were read
    -710: "invalid_replicas",
    -712: "invalid_replicas",
    -714: "not_ready",
    -800: "transfers_failed",  # the server that holds it is gone, or the page is too large
    -801: "checksums_failed",
}
"""Codes of a read that mean "no usable object", each with the counter that it adds to."""

DROPS = {
    -200: "no_room",  # no segment has room, and nothing may be evicted
    -703: "not_ready",
    -706: "not_ready",
    -714: "not_ready",
    -800: "transfers_failed",  # the server that should take it is gone
    -1700: "no_room",  # the tenant's quota
}
"""Codes of a write that mean "dropped, go on", each with the counter that it adds to."""

OUTAGES: dict[int, tuple[type[BackendError], str]] = {
    -103: (BackendUnavailable, "does not know this client (yet)"),
    -900: (BackendUnavailable, "cannot be reached"),
    -901: (BackendTimeout, "did not answer in time"),
    -1010: (BackendUnavailable, "is not serving"),
    -1011: (BackendUnavailable, "is not serving"),
}
"""Codes that mean "the store cannot answer"."""


def failure(code: int, action: str, master: str) -> BackendError:
    """Returns the error for a code that is neither a miss nor a drop.

    Args:
        code: Mooncake's negative code.
        action: what was requested, for the message.
        master: its address, for the message.
    """
    kind, what = OUTAGES.get(code, (BackendError, ""))
    if what:
        return kind(f"mooncake master {master} {what} (code {code}) on {action}")
    return BackendError(
        f"mooncake master {master} answered {action} with code {code}; Mooncake's error table "
        "says what it means"
    )
