"""Requests are signed as botocore signs them, whatever the headers and the query."""

from __future__ import annotations

import time

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials, ReadOnlyCredentials
from hicache_s3 import signing
from hicache_s3.signing import Signer
from hypothesis import given
from hypothesis import strategies as st

URL = "https://pages.s3.eu-central-1.amazonaws.com"
HOST = {"Host": URL.removeprefix("https://")}
UNSIGNED = Config(s3={"payload_signing_enabled": False})
names = st.sampled_from(["Range", "x-amz-meta-hicache", "x-amz-server-side-encryption", "X-Abc"])
texts = st.text("abcXYZ019 -=:/", min_size=1).filter(lambda text: text == text.strip())
queries = st.sampled_from(["", "?uploads=", "?partNumber=2&uploadId=a%2Fb", "?b=1&a-b=2&a=3&a=1"])


def by_botocore(
    credentials: Credentials, method: str, target: str, headers: dict[str, str]
) -> dict[str, str]:
    request = AWSRequest(method, URL + target, headers)
    request.context["client_config"] = UNSIGNED
    S3SigV4Auth(credentials, "s3", "eu-central-1").add_auth(request)
    return {name.lower(): text for name, text in request.headers.items()}


@given(
    secret=st.text(min_size=1),
    token=st.none() | st.text("abc+/=", min_size=1),
    method=st.sampled_from(["GET", "PUT", "HEAD", "DELETE"]),
    query=queries,
    headers=st.dictionaries(names, texts),
)
def test_a_signature_is_that_of_botocore(
    secret: str, token: str | None, method: str, query: str, headers: dict[str, str]
) -> None:
    signer = Signer("eu-central-1")
    target = f"/bucket/hicache/pages/0123456789abcdef/00{query}"
    while True:  # until both have signed within one second
        ours = signer.signed(
            ReadOnlyCredentials("AKID", secret, token), method, target, {**HOST, **headers}
        )
        theirs = by_botocore(Credentials("AKID", secret, token), method, target, headers)
        if ours["X-Amz-Date"] == theirs["x-amz-date"]:
            break
    assert {name.lower(): text for name, text in ours.items()} == {
        **theirs,
        "host": HOST["Host"],
    }


def test_the_key_of_a_day_is_made_anew_for_the_next_and_for_another_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    day_s = 86_400
    at_s = [day_s * 20_000]
    monkeypatch.setattr(signing.time, "gmtime", lambda gmtime=time.gmtime: gmtime(at_s[0]))

    def signed(signer: Signer, secret: str) -> dict[str, str]:
        return signer.signed(ReadOnlyCredentials("AKID", secret, None), "GET", "/b/x", HOST)

    kept = Signer("eu-central-1")
    seen = set()
    for secret, at in (("a", 0), ("a", day_s - 1), ("a", day_s), ("b", day_s), ("a", day_s)):
        at_s[0] = day_s * 20_000 + at
        assert signed(kept, secret) == signed(Signer("eu-central-1"), secret)
        seen.add(signed(kept, secret)["Authorization"])
    assert len(seen) == 4
