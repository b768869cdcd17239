"""Where the bucket is and how requests are signed: what boto3 and botocore know, asked once."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path

from hicache_core.errors import BackendDenied, BackendError
from hicache_s3.config import S3Config
from hicache_s3.connections import Address
from hicache_s3.errors import shown
from hicache_s3.masking import LogMask

DEFAULT_REGION = "us-east-1"


class Endpoint:
    """The bucket's address, boto3's client for rare requests, and signatures for all others.

    Attributes:
        client: boto3's S3 client; thread-safe.
        address: where pages are sent.
        url: scheme, host and port.
        path: what precedes an object's name in a request, ending in a slash.
        region: the region that requests are signed for.
    """

    def __init__(self, config: S3Config) -> None:
        """Reads the configuration and boto3's own; connects to nothing but what gives credentials.

        Raises:
            BackendDenied: no credentials are to be found.
            BackendError: boto3 cannot use these settings.
        """
        self._client_config = Config(
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            retries={"total_max_attempts": 2, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": config.addressing_style, "payload_signing_enabled": False},
        )
        self.mask = LogMask(config.secrets())
        self.mask.install()
        try:
            self._connect(config)
        except (BotoCoreError, ValueError) as error:
            self.mask.remove()
            raise BackendError(
                shown(f"boto3 cannot use these settings of s3: {error}", config.secrets())
            ) from None
        except BackendDenied:
            self.mask.remove()
            raise

    def _connect(self, config: S3Config) -> None:
        session = _session(config)
        self.region: str = config.region or session.region_name or DEFAULT_REGION
        verify = config.ca_bundle or os.environ.get("AWS_CA_BUNDLE")
        self.client: Any = session.client(
            "s3",
            region_name=self.region,
            endpoint_url=config.endpoint_url,
            config=self._client_config,
            verify=verify,
        )
        self._credentials: Any = session.get_credentials()
        if self._credentials is None:
            raise BackendDenied(
                "no credentials for s3: set access_key_id and secret_access_key, AWS_PROFILE, or "
                "give the machine a role"
            )
        url = urlsplit(_sample_url(self.client, config.bucket))
        self.path = url.path.removesuffix("x")
        self.url = f"{url.scheme}://{url.netloc}"
        # As botocore signs it: a server would compare "host:443" with "host".
        self._host = url.netloc.removesuffix(":443" if url.scheme == "https" else ":80")
        tls = None
        if url.scheme == "https":
            tls = ssl.create_default_context(cafile=verify or get_cert_path(True))
        self.address = Address(
            url.hostname or "",
            url.port or (443 if tls else 80),
            tls,
            config.connect_timeout_s,
            config.read_timeout_s,
        )

    def signed(self, method: str, target: str, headers: Mapping[str, str]) -> dict[str, str]:
        """``headers`` with the host and a signature of now; 50 µs, and rarely a renewal of keys.

        Raises:
            BotoCoreError: temporary credentials could not be renewed.
        """
        request = AWSRequest(method, self.url + target, dict(headers))
        request.context["client_config"] = self._client_config
        credentials = self._credentials.get_frozen_credentials()
        self.mask.hold(credentials)
        S3SigV4Auth(credentials, "s3", self.region).add_auth(request)
        return {"Host": self._host, **dict(request.headers.items())}

    def secrets(self) -> Sequence[str]:
        """What must not be shown, wherever boto3 found it."""
        return self.mask.secrets

    def close(self) -> None:
        """Closes the connections of boto3's client."""
        self.client.close()
        self.mask.remove()


class _Located(Exception):
    """Ends a request that is not meant to be sent."""


def _sample_url(client: Any, bucket: str) -> str:
    """The URL of an object ``x``: boto3 knows how bucket, region, style and endpoint make one.

    A presigned URL would be that of the global endpoint, whatever the region.
    """
    urls: list[str] = []

    def note(request: Any, **_: object) -> None:
        urls.append(request.url)
        raise _Located

    event = "before-sign.s3.GetObject"
    client.meta.events.register(event, note, unique_id=event)
    try:
        client.get_object(Bucket=bucket, Key="x")
    except _Located:
        pass
    finally:
        client.meta.events.unregister(event, unique_id=event)
    return urls[0]


def _session(config: S3Config) -> Any:
    held = (config.access_key_id, config.secret_access_key, config.session_token)
    key, secret, token = (item.get_secret_value() if item else None for item in held)
    return boto3.Session(
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
        profile_name=config.profile,
    )
