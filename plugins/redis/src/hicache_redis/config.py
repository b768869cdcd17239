"""Settings of the ``redis`` backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from redis.connection import parse_url

from hicache_core.plugin.backends import ConnectTimeout, Nbytes, Seconds, TimeToLive, masked_text
from hicache_core.storage.base import BackendConfig

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379

_URL_KEYS = {"scheme", "host", "port", "path", "db", "username", "password", "connection_class"}


def split_address(address: str, default_port: int) -> tuple[str, int]:
    """Returns host and port of ``host``, ``host:port`` or ``[v6 address]:port``.

    Raises:
        ValueError: the text is not such an address.
    """
    host, port = address, ""
    if address.startswith("[") or address.count(":") == 1:
        host, _, port = address.rpartition(":") if not address.endswith("]") else (address, "", "")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise ValueError(f"{address!r} is not an address; write host:port, as in 10.0.0.7:6379")
    return host.strip("[]"), int(port) if port else default_port


def _parse(url: SecretStr) -> dict[str, Any]:
    """Returns the connection settings that redis-py finds in a URL."""
    return dict(parse_url(url.get_secret_value()))  # type: ignore[no-untyped-call]


def _checked_addresses(addresses: tuple[str, ...]) -> tuple[str, ...]:
    for address in addresses:
        split_address(address, DEFAULT_PORT)
    return addresses


Addresses = Annotated[tuple[str, ...], AfterValidator(_checked_addresses)]


class RedisConfig(BackendConfig):
    """Settings of the ``redis`` backend."""

    # A message of pydantic would otherwise quote the URL, and with it a password.
    model_config = ConfigDict(hide_input_in_errors=True)

    url: SecretStr = Field(
        default=SecretStr(f"redis://127.0.0.1:{DEFAULT_PORT}"),
        validate_default=True,
        description="`redis://[user:password@]host[:port][/db]`, `rediss://…` for TLS, or "
        "`unix:///path/to.sock`; it is never shown, since it may hold a password",
    )
    username: str | None = Field(default=None, description="ACL user; overrides that of the URL")
    password: SecretStr | None = Field(default=None, description="overrides that of the URL")
    db: int | None = Field(
        default=None, ge=0, description="number of the database; overrides that of the URL"
    )
    cluster: bool = Field(
        default=False, description="the URL names one node of a Redis Cluster; keys go to shards"
    )
    nodes: Addresses = Field(
        default=(), description="more `host:port` of the cluster, used when the URL's is down"
    )
    sentinels: Addresses = Field(
        default=(),
        description="`host:port` of Sentinels that say where the primary is; the URL gives the "
        "rest (TLS, credentials, database)",
    )
    sentinel_master: str | None = Field(
        default=None, description="name of the primary that the Sentinels watch"
    )
    sentinel_username: str | None = Field(default=None, description="ACL user at the Sentinels")
    sentinel_password: SecretStr | None = Field(
        default=None, description="password at the Sentinels"
    )
    protocol: Literal[2, 3] = Field(
        default=2, description="RESP version; nothing here needs 3, and 2 works through any proxy"
    )
    tls_ca_file: Path | None = Field(
        default=None, description="CA certificates (PEM); those of the system if not set"
    )
    tls_cert_file: Path | None = Field(default=None, description="client certificate (PEM)")
    tls_key_file: Path | None = Field(default=None, description="key of the client certificate")
    tls_verify: bool = Field(
        default=True, description="whether the server's certificate and host name are checked"
    )
    key_prefix: str = Field(
        default="hicache:", max_length=100, description="start of every key in the database"
    )
    ttl_s: TimeToLive = None
    connect_timeout_s: ConnectTimeout = 1.0
    socket_timeout_s: Seconds = Field(
        default=1.0, description="limit for the server to send or take the next bytes"
    )
    max_connections: int = Field(
        default=8,
        ge=1,
        description="connections to one server; a call waits for a free one, for "
        "socket_timeout_s at most",
    )
    batch_connections: int = Field(
        default=2,
        ge=1,
        le=64,
        description="connections that share one large batch; in a cluster, shards at once",
    )
    window_nbytes: Nbytes = Field(
        default=2 * 2**20,
        description="a connection requests further pages while about this many bytes are still to "
        "come; limits the reply buffers of the server",
    )
    retries: int = Field(
        default=0, ge=0, le=10, description="maximum number of retries after a lost connection"
    )
    node_retry_interval_s: Seconds = Field(
        default=1.0, description="in a cluster: how long a shard that timed out is not used"
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: SecretStr) -> SecretStr:
        # Some errors of redis-py quote parts of the URL, so we raise our own.
        try:
            parts = _parse(value)
        except ValueError:
            raise ValueError(
                "the URL cannot be read; write redis://host:port/db, rediss://host:port/db or "
                "unix:///path/to.sock, with %-escapes in user and password"
            ) from None
        for key in parts:
            if key not in _URL_KEYS:
                raise ValueError(
                    f"the URL has a parameter {key!r}; only db is allowed there, the rest are "
                    "separate settings"
                )
        if value.get_secret_value().startswith("unix://") and not parts.get("path"):
            raise ValueError("the URL has no socket path; write unix:///path/to.sock")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if bool(self.sentinels) != bool(self.sentinel_master):
            raise ValueError("sentinels and sentinel_master go together; set both or neither")
        if self.cluster and self.sentinels:
            raise ValueError("cluster and sentinels exclude each other; a cluster fails over alone")
        if self.nodes and not self.cluster:
            raise ValueError("nodes are those of a cluster; set cluster to true")
        if (self.cluster or self.sentinels) and self.socket_path is not None:
            raise ValueError("a unix socket leads to one server; use redis:// or rediss://")
        if self.cluster and self.database:
            raise ValueError(f"a cluster has no database {self.database}; leave db out")
        if self.cluster and not set("{}").isdisjoint(self.key_prefix):
            raise ValueError("key_prefix has a brace: in a cluster all keys would go to one shard")
        if not self.tls and (self.tls_ca_file or self.tls_cert_file or self.tls_key_file):
            raise ValueError("TLS files are set, but the URL is not rediss://")
        return self

    @property
    def url_parts(self) -> dict[str, Any]:
        """What redis-py finds in the URL; may contain a password."""
        return _parse(self.url)

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.url.get_secret_value().startswith("rediss://")

    @property
    def socket_path(self) -> str | None:
        """Path of the unix socket, if the URL has one."""
        path = self.url_parts.get("path")
        return None if path is None else str(path)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the URL."""
        parts = self.url_parts
        return parts.get("host", "127.0.0.1"), parts.get("port", DEFAULT_PORT)

    @property
    def database(self) -> int:
        """Number of the database."""
        return int(self.url_parts.get("db", 0)) if self.db is None else self.db

    @property
    def credentials(self) -> tuple[str | None, str | None]:
        """User and password in use; must not be shown."""
        parts = self.url_parts
        password = self.password.get_secret_value() if self.password else parts.get("password")
        return self.username or parts.get("username"), password

    @property
    def shown_url(self) -> str:
        """The URL without its secrets."""
        return masked_text(self.url.get_secret_value())
