"""Logging without surprises: the standard library's, under ``hicache_core``, quiet by default."""

from __future__ import annotations

import logging

ROOT = "hicache_core"
# Without a handler the standard library prints warnings to stderr; a library should not.
logging.getLogger(ROOT).addHandler(logging.NullHandler())

_said: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Logs ``message`` only the first time that it is logged in this process; from any thread.

    Args:
        logger: the logger.
        level: of the record, such as ``logging.WARNING``.
        message: the text, without format arguments.
    """
    if not logger.isEnabledFor(level) or (logger.name, message) in _said:
        return
    _said.add((logger.name, message))
    logger.log(level, "%s", message)


def forget_logged() -> None:
    """Lets every message be logged once more; for tests and for a re-configured process."""
    _said.clear()
