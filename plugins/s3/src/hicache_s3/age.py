"""The age of an object, by the clock of the store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import TypeAlias

Headers: TypeAlias = Mapping[str, str]
"""By name in lower case."""


def seconds_of(date: str | None) -> float | None:
    """Returns the seconds since 1970 of a date in a header; None if it is not a date."""
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def now_at_store(headers: Headers) -> float:
    """Returns the time of the store when it answered; that of this machine if unknown."""
    now_s = seconds_of(headers.get("date"))
    return time.time() if now_s is None else now_s


def is_expired(headers: Headers, ttl_s: float | None) -> bool:
    """Returns whether the object with these headers was written at least ``ttl_s`` ago.

    Both dates are the store's, in whole seconds, so the clock of this machine does not matter.
    """
    if ttl_s is None:
        return False
    written_s = seconds_of(headers.get("last-modified"))
    return written_s is not None and now_at_store(headers) - written_s >= ttl_s
