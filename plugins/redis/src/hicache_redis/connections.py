"""Connections: dialled and authenticated by redis-py, kept in a pool for each server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from hicache_core.errors import BackendTimeout, BackendUnavailable, UseAfterClose
from hicache_redis.channel import channel_of
from hicache_redis.config import DEFAULT_SENTINEL_PORT, RedisConfig, split_address
from hicache_redis.errors import failure
from hicache_redis.resp import Wire


class Dialer:
    """Opens connections according to the settings. Any thread may call it."""

    def __init__(self, config: RedisConfig) -> None:
        self._config = config
        username, password = config.credentials
        self._kwargs: dict[str, Any] = {
            "socket_timeout": config.socket_timeout_s,
            "socket_connect_timeout": config.connect_timeout_s,
            "retry": Retry(NoBackoff(), 0),  # redis-py's default stalls for seconds
            "protocol": config.protocol,
            "username": username,
            "password": password,
            "db": config.database,
            "driver_info": None,
        }
        self._tls_kwargs: dict[str, Any] = {}
        if config.tls:
            self._tls_kwargs = {
                "ssl_ca_certs": config.tls_ca_file and str(config.tls_ca_file),
                "ssl_certfile": config.tls_cert_file and str(config.tls_cert_file),
                "ssl_keyfile": config.tls_key_file and str(config.tls_key_file),
                "ssl_cert_reqs": "required" if config.tls_verify else "none",
                "ssl_check_hostname": config.tls_verify,
            }

    def dial(self, address: tuple[str, int] | str) -> Wire:
        """Returns a new connection, authenticated and with the database selected.

        Args:
            address: host and port, or the path of a unix socket.

        Raises:
            BackendError: it cannot be opened, or the server refused the credentials.
        """
        connection = self._connection(address)
        try:
            connection.connect()
            sock = connection._sock  # redis-py has no public name for it; the pin is `redis<9`
            channel = channel_of(sock, self._config.socket_timeout_s)
        except (RedisError, OSError) as error:
            connection.disconnect()
            # Not chained: what redis-py raises may quote credentials.
            raise failure(error, shown(address), "connect") from None
        return Wire(channel, connection.disconnect)

    def primary(self) -> tuple[str, int]:
        """Returns the address of the primary, from the Sentinels.

        Raises:
            BackendError: none of them knows.
        """
        config = self._config
        password = config.sentinel_password
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
            [split_address(text, DEFAULT_SENTINEL_PORT) for text in config.sentinels],
            sentinel_kwargs={
                "socket_timeout": config.socket_timeout_s,
                "socket_connect_timeout": config.connect_timeout_s,
                "retry": Retry(NoBackoff(), 0),
                "username": config.sentinel_username,
                "password": password and password.get_secret_value(),
                "ssl": config.tls,
                **self._tls_kwargs,
            },
        )
        try:
            host, port = sentinel.discover_master(config.sentinel_master)
        except (RedisError, OSError) as error:
            name = f"sentinels {', '.join(config.sentinels)}"
            raise failure(error, name, f"name the primary {config.sentinel_master}") from None
        finally:
            sentinel.close()
        return str(host), int(port)

    def _connection(self, address: tuple[str, int] | str) -> Any:
        kind: Any = SSLConnection if self._config.tls else Connection
        if isinstance(address, str):
            kind = UnixDomainSocketConnection
            return kind(path=address, **self._kwargs)
        host, port = address
        return kind(host=host, port=port, **self._kwargs, **self._tls_kwargs)


def shown(address: tuple[str, int] | str) -> str:
    """An address for messages."""
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


class _Lease:
    """See ``Pool.lease``."""

    __slots__ = ("_action", "_pool", "_wire")

    def __init__(self, pool: Pool, action: str) -> None:
        self._pool = pool
        self._action = action

    def __enter__(self) -> Wire:
        self._wire = self._pool._take()
        return self._wire

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._pool._end(self._wire, error, self._action)


class Pool:
    """The connections to one server; one thread at a time uses each. Any thread may call it.

    A connection is returned only if no reply is outstanding. After an interruption it is closed:
    otherwise its next reply would be taken for the answer to another request.
    """

    def __init__(
        self, server: str, dial: Callable[[], Wire], config: RedisConfig, *, rests: bool = False
    ) -> None:
        """Opens nothing.

        Args:
            server: the address, for messages.
            dial: opens a connection.
            config: limits.
            rests: whether to refuse calls for ``node_retry_interval_s`` after a timeout.
        """
        self.server = server
        self.n_opened = 0
        self._dial = dial
        self._limit = config.max_connections
        self._wait_s = config.socket_timeout_s
        self._rest_s = config.node_retry_interval_s if rests else 0.0
        self._rests_until = 0.0
        self._idle: list[Wire] = []
        self._n_open = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def n_open(self) -> int:
        """Connections that are open now, in use or not."""
        return self._n_open

    def lease(self, action: str) -> _Lease:
        """Returns a context manager that yields a connection without outstanding replies.

        Args:
            action: what it is for, for messages.

        Entering raises ``BackendError`` if there is no connection; leaving also for an ``OSError``
        of the block.
        """
        return _Lease(self, action)

    def _end(self, wire: Wire, error: BaseException | None, action: str) -> None:
        """Ends a lease; ``error`` is what the block raised."""
        if error is None:
            self._put(wire)
            return
        self._discard(wire)
        if isinstance(error, OSError):
            known = failure(error, self.server, action)
            if isinstance(known, BackendTimeout):
                self._rests_until = time.monotonic() + self._rest_s
            if known is not error:
                raise known from error

    def close(self) -> None:
        """Closes idle connections now, and those in use when they are returned."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._n_open -= len(idle)
            self._changed.notify_all()
        for wire in idle:
            wire.close()

    def drop_idle(self) -> None:
        """Closes idle connections: the server has changed its role."""
        with self._changed:
            idle, self._idle = self._idle, []
            self._n_open -= len(idle)
            self._changed.notify_all()
        for wire in idle:
            wire.close()

    def _take(self) -> Wire:
        while True:
            with self._changed:
                self._wait_for_room()
                if not self._idle:
                    self._n_open += 1
                    break
                wire = self._idle.pop()
            # A server that was restarted, or that closes idle clients, has hung up by now.
            if wire.is_quiet():
                return wire
            self._discard(wire)
        try:
            wire = self._dial()
        except BaseException as error:
            self._forget()
            if isinstance(error, BackendTimeout):
                self._rests_until = time.monotonic() + self._rest_s
            raise
        self.n_opened += 1
        return wire

    def _wait_for_room(self) -> None:
        """Blocks until a connection is idle or may be opened; the caller holds the lock."""
        if time.monotonic() < self._rests_until:
            raise BackendUnavailable(f"redis {self.server} timed out lately and is left alone")
        free = bool(self._idle) or self._changed.wait_for(
            lambda: self._closed or self._idle or self._n_open < self._limit, self._wait_s
        )
        if self._closed:
            raise UseAfterClose("the redis backend was closed")
        if not free:
            raise BackendTimeout(
                f"all {self._limit} connections to redis {self.server} were busy for "
                f"{self._wait_s:g} s; raise max_connections"
            )

    def _put(self, wire: Wire) -> None:
        with self._changed:
            if not self._closed:
                self._idle.append(wire)
                self._changed.notify()
                return
        self._discard(wire)

    def _discard(self, wire: Wire) -> None:
        wire.close()
        self._forget()

    def _forget(self) -> None:
        with self._changed:
            self._n_open -= 1
            self._changed.notify()
