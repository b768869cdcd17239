"""Where the bucket is and how requests are signed: what boto3 and botocore know, asked once."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
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
            signature_version="s3v4",  # without it, sample addresses are not those of the region
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            retries={"total_max_attempts": 2, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": config.addressing_style, "payload_signing_enabled": False},
        )
        try:
            self._connect(config)
        except (BotoCoreError, ValueError) as error:
            raise BackendError(
                shown(f"boto3 cannot use these settings of s3: {error}", config.secrets())
            ) from None

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
        # boto3 knows how bucket, region, style and endpoint make a URL: take one of its apart.
        sample = self.client.generate_presigned_url(
            "get_object", Params={"Bucket": config.bucket, "Key": "x"}
        )
        url = urlsplit(sample)
        self.path = url.path.removesuffix("x")
        self.url = f"{url.scheme}://{url.netloc}"
        self._host = url.netloc
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
        S3SigV4Auth(credentials, "s3", self.region).add_auth(request)
        return {"Host": self._host, **dict(request.headers.items())}

    def close(self) -> None:
        """Closes the connections of boto3's client."""
        self.client.close()


def _session(config: S3Config) -> Any:
    held = (config.access_key_id, config.secret_access_key, config.session_token)
    key, secret, token = (item.get_secret_value() if item else None for item in held)
    return boto3.Session(
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
        profile_name=config.profile,
    )
