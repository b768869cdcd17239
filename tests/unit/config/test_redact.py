"""Masking: what looks secret is never shown, what does not stays readable."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.config.redact import MASK, looks_secret, masked, masked_text


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "PASSWORD",
        "redis_password",
        "sentinelPassword",
        "secret",
        "aws_secret_access_key",
        "api-key",
        "apiKey",
        "auth_token",
        "access_key_id",
        "private_key",
        "credentials",
        "sse_customer_key",
        "connection_string",
    ],
)
def test_these_names_are_secret(key: str) -> None:
    assert looks_secret(key)
    assert masked({key: "hunter2"}) == {key: MASK}
    assert masked({key: 1234}) == {key: MASK}


@pytest.mark.parametrize(
    "key",
    [
        "path",
        "url",
        "host",
        "page_size",
        "max_tokens",
        "prefetch_timeout_per_ki_token",
        "key_prefix",
        "monkey",
    ],
)
def test_these_names_are_not(key: str) -> None:
    assert not looks_secret(key)
    assert masked({key: "shown"}) == {key: "shown"}


def test_an_unset_secret_is_shown_as_unset() -> None:
    assert masked({"password": None, "token": ""}) == {"password": None, "token": ""}


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters=" \t\n\r\x0b\x0c'\"", categories=["L", "N", "P"])))
def test_userinfo_of_a_url_is_masked_whatever_it_holds(password: str) -> None:
    shown = masked_text(f"no answer from redis://user:{password}@host:1/0, gave up")
    assert shown == f"no answer from redis://{MASK}@host:1/0, gave up"


def test_secrets_in_a_query_are_masked_and_the_rest_is_not() -> None:
    url = "https://host/bucket?region=eu&token=abc&x=1"
    assert masked_text(url) == f"https://host/bucket?region=eu&token={MASK}&x=1"


def test_bytes_and_nested_lists_are_walked() -> None:
    value = {"hosts": [b"redis://u:p@a", ("redis://u:p@b",)], "n": 3}
    assert masked(value) == {"hosts": [f"redis://{MASK}@a", [f"redis://{MASK}@b"]], "n": 3}


@pytest.mark.parametrize(
    "dsn",
    ["host=db password=geheim", "password = 'geheim und mehr' host=db", 'dbname=x passwd="geheim"'],
)
def test_a_password_in_a_text_of_pairs_is_masked(dsn: str) -> None:
    shown = masked({"dsn": dsn})
    assert "geheim" not in str(shown)
    assert "mehr" not in str(shown)
    assert MASK in str(shown)
