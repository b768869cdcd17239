"""Settings: wrong ones are refused, all are in the README, secrets are never shown."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hicache_s3 import S3Backend, S3Config, hicache_backends
from hicache_s3.endpoint import Endpoint
from pydantic import ValidationError

from hicache_core.errors import BackendDenied, BackendError
from hicache_core.plugin.hookspecs import ENTRY_POINT_GROUP
from hicache_core.types import BackendContext
from plugins.s3.tests.conftest import MakeBackend
from plugins.s3.tests.world import NAMESPACE, keys_of, put
from tests.servers.weed import SECRET, Weed, settings

PLUGIN = Path(__file__).parents[1]
SECRETS = ("AK-very-private", "SK-very-private", "TOKEN-very-private")
HELD = dict(zip(("access_key_id", "secret_access_key", "session_token"), SECRETS, strict=True))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"bucket": ""}, "bucket"),
        ({"bucket": "a b"}, "bucket"),
        ({"prefix": "a b"}, "prefix"),
        ({"prefix": "a/../b/"}, "prefix must have no part"),
        ({"endpoint_url": "localhost:9000"}, "endpoint_url must be http"),
        ({"endpoint_url": "http://u:p@localhost"}, "no credentials"),
        ({"endpoint_url": "http://localhost/path"}, "endpoint_url must be http"),
        ({"access_key_id": "a"}, "together"),
        ({"session_token": "a"}, "needs access_key_id"),
        ({"sse_kms_key_id": "a"}, "needs sse"),
        ({"part_nbytes": 1000}, "5 MiB"),
        ({"pack_nbytes": "much"}, "pack_nbytes"),
        ({"threads": 0}, "threads"),
        ({"buckets": "x"}, "buckets"),
    ],
)
def test_a_wrong_setting_is_an_error_that_says_which(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        S3Config.model_validate({"bucket": "b", **wrong})


def test_sizes_may_be_text() -> None:
    config = S3Config.model_validate({"bucket": "b", "pack_nbytes": "16MiB"})
    assert config.pack_nbytes == 16 << 20


@pytest.mark.parametrize(
    ("given", "used"),
    [("hicache/", "hicache/"), ("/a", "a"), ("//a//b//", "a/b/"), ("/", ""), ("", "")],
)
def test_a_prefix_has_no_empty_part(given: str, used: str) -> None:
    assert S3Config(bucket="b", prefix=given).prefix == used


def test_secrets_are_in_no_representation_and_no_error_of_validation() -> None:
    config = S3Config.model_validate({"bucket": "b", **HELD})
    backend = S3Backend(config, BackendContext(NAMESPACE))
    shown = [repr(config), str(config), repr(backend), str(config.model_dump())]
    for wrong in ({"threads": "x"}, {"endpoint_url": f"http://u:{SECRETS[1]}@h"}):
        with pytest.raises(ValidationError) as caught:
            S3Config.model_validate({"bucket": "b", **HELD, **wrong})
        shown.append(str(caught.value))
    assert not any(secret in text for secret in SECRETS for text in shown)


def test_secrets_are_in_no_error_and_no_log(
    weed: Weed, caplog: pytest.LogCaptureFixture, make_backend: MakeBackend
) -> None:
    caplog.set_level(logging.DEBUG)
    config = S3Config(**settings(weed.url, **HELD))
    with pytest.raises(BackendDenied) as caught:
        S3Backend(config, BackendContext(NAMESPACE)).open()
    backend = make_backend()
    put(backend, keys_of(5))
    findings = [finding.message for finding in backend.diagnose()]
    for text in (str(caught.value), repr(caught.value), caplog.text, *findings):
        assert not any(secret in text for secret in (*SECRETS, SECRET))


def test_without_credentials_open_says_what_to_set(weed: Weed) -> None:
    config = S3Config(bucket="b", endpoint_url=weed.url)
    with pytest.raises(BackendDenied, match=r"set access_key_id and secret_access_key"):
        S3Backend(config, BackendContext(NAMESPACE)).open()


def test_credentials_are_found_as_boto3_finds_them(
    weed: Weed, monkeypatch: pytest.MonkeyPatch, make_backend: MakeBackend
) -> None:
    found = settings(weed.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", found["access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", found["secret_access_key"])
    backend = make_backend(access_key_id=None, secret_access_key=None)
    put(backend, keys_of(5))


def test_an_unknown_profile_is_an_error_that_names_it() -> None:
    config = S3Config(bucket="b", profile="nobody")
    with pytest.raises(BackendError, match=r"nobody"):
        S3Backend(config, BackendContext(NAMESPACE)).open()


@pytest.mark.parametrize(
    ("options", "url", "path"),
    [
        ({}, "https://pages.s3.eu-central-1.amazonaws.com", "/"),
        ({"addressing_style": "path"}, "https://s3.eu-central-1.amazonaws.com", "/pages/"),
        ({"endpoint_url": "http://127.0.0.1:9000"}, "http://127.0.0.1:9000", "/pages/"),
        (
            {"endpoint_url": "https://store.example", "addressing_style": "virtual"},
            "https://pages.store.example",
            "/",
        ),
    ],
)
def test_bucket_region_and_style_make_the_address(
    options: dict[str, Any], url: str, path: str
) -> None:
    place = {"bucket": "pages", "region": "eu-central-1", **options}
    config = S3Config.model_validate({**place, "access_key_id": "a", "secret_access_key": "b"})
    endpoint = Endpoint(config)
    assert (endpoint.url, endpoint.path) == (url, path)
    assert (endpoint.address.tls is not None) == url.startswith("https")
    endpoint.close()


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://store.example:443", "store.example"),
        ("http://store.example:80", "store.example"),
        ("http://store.example:443", "store.example:443"),
        ("http://[::1]:9000", "[::1]:9000"),
    ],
)
def test_the_host_that_is_sent_is_the_one_that_is_signed(url: str, host: str) -> None:
    config = {"bucket": "pages", "access_key_id": "a", "secret_access_key": "b"}
    endpoint = Endpoint(S3Config.model_validate({**config, "endpoint_url": url}))
    request = AWSRequest("GET", url, endpoint.signed("GET", "/pages/x", {}))
    assert request.headers["Host"] == host
    del request.headers["Host"]  # botocore then adds what it takes for the host
    headers = S3SigV4Auth(Credentials("a", "b"), "s3", "us-east-1").headers_to_sign(request)
    assert headers["host"] == host
    endpoint.close()


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    rows = [line for line in (PLUGIN / "README.md").read_text().splitlines() if "| `" in line]
    for name, field in S3Config.model_fields.items():
        row = next((row for row in rows if row.startswith(f"| `{name}` |")), "")
        assert row, f"{name} is missing"
        if isinstance(field.default, bool) or field.default is None:
            continue
        if isinstance(field.default, (int, float)) and field.default < 10_000:
            assert f"| {field.default:g} |" in row, name


def test_the_entry_point_names_the_module_with_the_hook() -> None:
    text = (PLUGIN / "pyproject.toml").read_text()
    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]\ns3 = "hicache_s3"' in text
    assert hicache_backends() == [S3Backend]
    assert S3Backend.name == "s3"
