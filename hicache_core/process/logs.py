"""Logging without surprises: the standard library's, under ``hicache_core``, quiet by default."""

from __future__ import annotations

import logging
import threading

ROOT = "hicache_core"
# Without a handler the standard library prints warnings to stderr; a library should not.
logging.getLogger(ROOT).addHandler(logging.NullHandler())

MAX_SAID = 1024
_said: dict[tuple[str, str], None] = {}  # the oldest first
_lock = threading.Lock()


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Logs ``message`` only the first time that it is logged in this process; from any thread.

    Of more than ``MAX_SAID`` messages the oldest are forgotten, so a message should not hold what
    differs each time, such as a duration.

    Args:
        logger: the logger.
        level: of the record, such as ``logging.WARNING``.
        message: the text, without format arguments.
    """
    said = (logger.name, message)
    if not logger.isEnabledFor(level) or said in _said:
        return
    with _lock:
        if said in _said:
            return
        _said[said] = None
        if len(_said) > MAX_SAID:
            del _said[next(iter(_said))]
    logger.log(level, "%s", message)


def forget_logged() -> None:
    """Lets every message be logged once more; for tests and for a re-configured process."""
    with _lock:
        _said.clear()
