"""Keeps credentials out of botocore's debug log, which shows headers and answers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from hicache_s3.errors import shown

_LOGGERS = ("botocore.auth", "botocore.endpoint", "botocore.parsers")


class Credentials(Protocol):
    """A snapshot of botocore's credentials."""

    access_key: str
    secret_key: str
    token: str | None


class LogMask(logging.Filter):
    """Masks known secrets in botocore's log records, from ``install`` to ``remove``.

    Attributes:
        secrets: the texts to mask.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self.secrets: Sequence[str] = tuple(secrets)

    def hold(self, credentials: Credentials) -> None:
        """Adds credentials that boto3 found or renewed."""
        held = (credentials.access_key, credentials.secret_key, credentials.token)
        if any(text and text not in self.secrets for text in held):
            self.secrets = (*self.secrets, *(text for text in held if text))[-12:]

    def filter(self, record: logging.LogRecord) -> bool:
        # docstring inherited
        text = record.getMessage()
        if any(secret in text for secret in self.secrets):
            record.msg, record.args = shown(text, self.secrets), ()
        return True

    def install(self) -> None:
        """Starts masking."""
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)

    def remove(self) -> None:
        """Stops masking; a second call does nothing."""
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self)
