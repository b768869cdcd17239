"""How old an object is, by the clock of the store that wrote it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import TypeAlias

Headers: TypeAlias = Mapping[str, str] | Message
"""Names in lower case, or any case if it is a message."""


def seconds_of(date: str | None) -> float | None:
    """Seconds since 1970 of a date as it stands in a header; None if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def now_at_store(headers: Headers) -> float:
    """The store's own time when it answered; this machine's if it does not say."""
    now_s = seconds_of(headers.get("date"))
    return time.time() if now_s is None else now_s


def is_expired(headers: Headers, ttl_s: float | None) -> bool:
    """Whether these headers are of an object that was written ``ttl_s`` ago or before.

    Both dates are the store's, in whole seconds, so the clock of this machine does not matter.
    """
    if ttl_s is None:
        return False
    written_s = seconds_of(headers.get("last-modified"))
    return written_s is not None and now_at_store(headers) - written_s >= ttl_s
