"""What S3's error codes mean here: the one table of the plugin.

A code that is not in it is a ``BackendError`` that names it; an absent object is not an error.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable
from typing import NamedTuple

from hicache_core.errors import (
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
)
from hicache_core.plugin.backends import MASK, masked_text

ABSENT = frozenset(["NoSuchKey", "NotFound"])
"""Codes that mean "no such object": a miss."""

BUSY = frozenset(
    ["SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "TooManyRequests"]
)
"""Codes after which a request is retried for a limited time."""

_RIGHTS = "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"
_REGION = "set region (and endpoint_url) to the bucket's own"

FAILURES: dict[str, tuple[type[BackendError], str]] = {
    "NoSuchBucket": (BackendError, "create the bucket, or set create_bucket"),
    "InvalidBucketName": (BackendError, "set bucket to a legal name"),
    "AccessDenied": (BackendDenied, f"{_RIGHTS}; without ListBucket every miss looks like this"),
    "AllAccessDisabled": (BackendDenied, "the owner of the bucket has disabled all access"),
    "InvalidAccessKeyId": (BackendDenied, "the server does not know this access_key_id"),
    "SignatureDoesNotMatch": (BackendDenied, "secret_access_key belongs to another access_key_id"),
    "ExpiredToken": (BackendDenied, "session_token has expired; temporary keys must be renewed"),
    "InvalidToken": (BackendDenied, "session_token is not valid for these keys"),
    "RequestTimeTooSkewed": (
        BackendDenied,
        "set the clock of this machine (NTP): it is minutes off",
    ),
    "PermanentRedirect": (BackendError, _REGION),
    "TemporaryRedirect": (BackendError, _REGION),
    "AuthorizationHeaderMalformed": (BackendDenied, _REGION),
    "IllegalLocationConstraintException": (BackendError, _REGION),
    "KMS.DisabledException": (BackendDenied, "enable the KMS key, or set sse_kms_key_id"),
    "KMS.NotFoundException": (BackendDenied, "set sse_kms_key_id to a key of this region"),
    "QuotaExceeded": (BackendFull, "raise the quota, or let a lifecycle rule expire old pages"),
    "XMinioStorageFull": (BackendFull, "add room, or let a lifecycle rule expire old pages"),
    "InsufficientStorage": (BackendFull, "add room, or let a lifecycle rule expire old pages"),
    "EntityTooLarge": (BackendError, "lower multipart_nbytes"),
    "SlowDown": (BackendUnavailable, "the store limits requests; use larger pages or pack"),
    "TooManyRequests": (BackendUnavailable, "the store limits requests; use larger pages or pack"),
    "ServiceUnavailable": (BackendUnavailable, "the store is overloaded"),
    "InternalError": (BackendUnavailable, "see the log of the store"),
    "RequestTimeout": (BackendTimeout, "the rest of a request did not reach the store in time"),
}

_STATUS_CODES = {
    301: "PermanentRedirect",
    307: "TemporaryRedirect",
    403: "AccessDenied",
    404: "NoSuchKey",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    507: "InsufficientStorage",
}
_ELEMENT = re.compile(r"<(Code|Message|Region|Endpoint)>([^<]*)</")


class Refusal(NamedTuple):
    """What an answer with an error status says.

    Attributes:
        status: HTTP status.
        code: S3's own code, or the one that goes with the status if there is no body.
        message: the server's sentence, with the region or endpoint that it names.
    """

    status: int
    code: str
    message: str


def parse_refusal(status: int, body: bytes, region: str | None = None) -> Refusal:
    """Reads an error answer.

    Args:
        status: of HTTP.
        body: XML, or empty.
        region: the header ``x-amz-bucket-region``.
    """
    found = dict(_ELEMENT.findall(body.decode("utf-8", "replace")))
    code = found.get("Code") or _STATUS_CODES.get(status, f"HTTP {status}")
    where = found.get("Region") or region
    parts = [found.get("Message", "").strip()]
    if where:
        parts.append(f"the bucket's region is {where}")
    if "Endpoint" in found:
        parts.append(f"its endpoint is {found['Endpoint']}")
    return Refusal(status, code, "; ".join(part for part in parts if part))


def refused(refusal: Refusal, action: str, secrets: Iterable[str] = ()) -> BackendError:
    """Returns the error for an answer that is neither a success nor a miss.

    Args:
        refusal: the answer.
        action: what was requested, for the message.
        secrets: texts to mask in the message.
    """
    kind, advice = FAILURES.get(refusal.code, (BackendError, "see the S3 list of error codes"))
    said = f": {refusal.message}" if refusal.message else ""
    return kind(shown(f"{action}: {refusal.code} ({refusal.status}){said}; {advice}", secrets))


def lost(error: OSError, where: str) -> BackendError:
    """The error for a connection that could not be made, or broke.

    Args:
        error: what happened to it.
        where: the endpoint and what was being done.
    """
    if isinstance(error, TimeoutError):
        return BackendTimeout(f"{where}: no answer in time")
    if isinstance(error, ssl.SSLCertVerificationError):
        return BackendUnavailable(f"{where}: {error.verify_message}; set ca_bundle")
    text = str(error) or type(error).__name__
    return BackendUnavailable(f"{where}: {text}; check endpoint_url and the server")


def shown(text: str, secrets: Iterable[str]) -> str:
    """``text`` without secrets."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return masked_text(text)
