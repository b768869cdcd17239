"""The address of the bucket and the credentials of requests, from boto3 and botocore."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path

from hicache_core.errors import BackendDenied, BackendError
from hicache_s3.config import S3Config
from hicache_s3.connections import Address
from hicache_s3.errors import shown
from hicache_s3.masking import LogMask
from hicache_s3.signing import Signer

DEFAULT_REGION = "us-east-1"


class Endpoint:
    """The address of the bucket, boto3's client for rare requests, and signatures for the others.

    Attributes:
        client: boto3's S3 client; any thread may use it.
        address: of the server for pages.
        url: scheme, host and port.
        path: prefix of an object's name in a request; ends with a slash.
        region: for which requests are signed.
    """

    def __init__(self, config: S3Config) -> None:
        """Reads the settings and boto3's own; connects only to providers of credentials.

        Raises:
            BackendDenied: there are no credentials.
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
        self._signer = Signer(self.region)
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
        """Returns ``headers`` with the host and a current signature.

        May renew temporary credentials, which blocks.

        Args:
            method: of the request.
            target: path and query.
            headers: to be signed too.

        Raises:
            BotoCoreError: temporary credentials could not be renewed.
        """
        credentials = self._credentials.get_frozen_credentials()
        self.mask.hold(credentials)
        return self._signer.signed(credentials, method, target, {"Host": self._host, **headers})

    @property
    def signs_in_time(self) -> bool:
        """Whether temporary credentials are renewed within time limits, those of botocore.

        It sets none for a program of the user that gives credentials.
        """
        return bool(self._credentials.method != "custom-process")

    def secrets(self) -> Sequence[str]:
        """Returns the secrets that must not be shown, wherever boto3 found them."""
        return self.mask.secrets

    def close(self) -> None:
        """Closes the connections of boto3's client."""
        self.client.close()
        self.mask.remove()


class _Located(Exception):
    """Stops a request before it is sent."""


def _sample_url(client: Any, bucket: str) -> str:
    """Returns the URL of an object ``x``, as boto3 builds it from bucket, region and endpoint.

    A presigned URL would use the global endpoint for every region.
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
