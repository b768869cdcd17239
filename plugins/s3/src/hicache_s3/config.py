"""Settings of the ``s3`` backend; boto3 finds the rest (credentials, region)."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

from hicache_core.plugin.backends import ConnectTimeout, Nbytes, Seconds, TimeToLive
from hicache_core.storage.base import BackendConfig

MIN_PART_NBYTES = 5 * 2**20
"""Minimum size of a part of a multipart upload in S3, except for the last one."""


class S3Config(BackendConfig):
    """Settings of the ``s3`` backend."""

    # Errors of validation would otherwise show the value, and that may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    bucket: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._:/-]+$", description="the bucket")
    prefix: str = Field(
        default="hicache/",
        pattern=r"^[A-Za-z0-9._/-]*$",
        description="start of every object name; two caches with two prefixes share nothing",
    )
    endpoint_url: str | None = Field(
        default=None, description="URL of an S3-compatible server; AWS if not set"
    )
    region: str | None = Field(
        default=None, description="region of the bucket; by default as boto3 finds it, or us-east-1"
    )
    access_key_id: SecretStr | None = Field(
        default=None, description="with secret_access_key; by default what boto3 finds"
    )
    secret_access_key: SecretStr | None = Field(default=None, description="with access_key_id")
    session_token: SecretStr | None = Field(
        default=None, description="for temporary keys, which are not refreshed"
    )
    profile: str | None = Field(default=None, description="profile of the AWS config files")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="auto", description="path: server/bucket, virtual: bucket.server"
    )
    ca_bundle: str | None = Field(
        default=None, description="PEM file of the authorities that sign the server's certificate"
    )
    sse: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = Field(
        default=None, description="server-side encryption; the bucket's default if not set"
    )
    sse_kms_key_id: str | None = Field(default=None, description="KMS key, with sse aws:kms")
    create_bucket: bool = Field(default=False, description="open() creates a missing bucket")
    threads: int = Field(
        default=8, ge=1, le=256, description="requests of one batch that run at the same time"
    )
    max_connections: int = Field(
        default=64, ge=1, le=1024, description="maximum number of connections of this process"
    )
    connect_timeout_s: ConnectTimeout = 2.0
    read_timeout_s: Seconds = Field(
        default=5.0, description="time limit for the next bytes from the server"
    )
    retry_s: float = Field(
        default=2.0,
        ge=0,
        description="how long a request is retried after SlowDown and other 5xx answers",
    )
    ttl_s: TimeToLive = Field(
        default=None,
        description="objects older than this are misses; a lifecycle rule of the bucket must "
        "delete them",
    )
    pack: bool = Field(
        default=True, description="whether small pages of one write are packed into one object"
    )
    pack_nbytes: Nbytes = Field(
        default=8 * 2**20, description="size of a pack, rounded to whole pages"
    )
    multipart_nbytes: Nbytes = Field(
        default=64 * 2**20, description="larger objects are written in parts"
    )
    part_nbytes: Nbytes = Field(default=16 * 2**20, description="size of a part; at least 5 MiB")
    index_cache_packs: int = Field(
        default=1024, ge=1, description="packs whose index is kept in memory; about 10 KB each"
    )
    index_ttl_s: Seconds = Field(
        default=300.0, description="how long a cached index is used without checking it"
    )

    @field_validator("endpoint_url")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is None:
            return None
        url = urlsplit(value)
        if (
            url.scheme not in ("http", "https")
            or not url.hostname
            or url.query
            or url.path.strip("/")
        ):
            raise ValueError("endpoint_url must be http://host[:port] or https://host[:port]")
        if "@" in url.netloc:
            raise ValueError("endpoint_url must hold no credentials; set access_key_id instead")
        return value.rstrip("/")

    @field_validator("prefix")
    @classmethod
    def _normalise_prefix(cls, value: str) -> str:
        """Without empty parts: some stores leave them out of the names that they list."""
        parts = [part for part in value.split("/") if part]
        if "." in parts or ".." in parts:
            raise ValueError("prefix must have no part . or ..; name it otherwise")
        return "/".join(parts) + "/" * (value.endswith("/") and bool(parts))

    @field_validator("part_nbytes")
    @classmethod
    def _check_part(cls, value: int) -> int:
        if value < MIN_PART_NBYTES:
            raise ValueError(f"part_nbytes must be at least {MIN_PART_NBYTES} (5 MiB)")
        return value

    @model_validator(mode="after")
    def _check_pairs(self) -> S3Config:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("set access_key_id and secret_access_key together, or neither")
        if self.session_token is not None and self.access_key_id is None:
            raise ValueError("session_token needs access_key_id and secret_access_key")
        if self.sse_kms_key_id is not None and self.sse not in ("aws:kms", "aws:kms:dsse"):
            raise ValueError("sse_kms_key_id needs sse to be aws:kms or aws:kms:dsse")
        return self

    def secrets(self) -> list[str]:
        """What must never be shown."""
        held = (self.access_key_id, self.secret_access_key, self.session_token)
        return [secret.get_secret_value() for secret in held if secret is not None]
