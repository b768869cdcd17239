"""Whether the master lives: an idle connection that the kernel closes when its process ends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from hicache_core.errors import BackendError, BackendUnavailable


class Liveness:
    """Lets calls through while the master lives, and fails them at once while it does not.

    Mooncake's own calls block for seconds when the master has ended. A second connection to its
    port, on which nothing is sent, shows that within a microsecond: it is closed when the process
    of the master ends. A master that hangs is noticed by a call that times out (``lost``). After
    either, every call fails at once for ``retry_interval_s``. Then one caller connects and calls
    the master, and the others continue when it has answered.

    Any thread may call any method.
    """

    def __init__(
        self,
        address: tuple[str, int] | None,
        *,
        connect_timeout_s: float,
        retry_interval_s: float,
        ping: Callable[[], BackendError | None],
    ) -> None:
        """Connects to nothing.

        Args:
            address: host and port of the master; None if there are several (no check is made).
            connect_timeout_s: time limit for the connection.
            retry_interval_s: how long calls fail at once.
            ping: calls the master; returns the error if it does not answer.
        """
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._retry_interval_s = retry_interval_s
        self._ping = ping
        self._lock = threading.Lock()
        self._canary: socket.socket | None = None
        self._reason: str | None = None  # why calls fail; None while the master lives
        self._retry_at = 0.0
        self._is_trying = False

    def connect(self) -> str | None:
        """Opens the second connection.

        Returns:
            The local address that faces the master; None if there are several masters.

        Raises:
            BackendUnavailable: nothing listens there, or it does not answer within the limit.
        """
        if self._address is None:
            return None
        host, port = self._address
        try:
            canary = socket.create_connection(self._address, self._connect_timeout_s)
        except OSError as error:
            raise BackendUnavailable(
                f"no mooncake_master at {host}:{port} ({error}); start it, or correct "
                "master_server_address"
            ) from error
        canary.setblocking(False)
        canary.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        canary.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        canary.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        canary.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        previous, self._canary = self._canary, canary
        if previous is not None:
            previous.close()
        return str(canary.getsockname()[0])

    def check(self) -> None:
        """Returns if the master seems to be alive.

        Raises:
            BackendError: it is lost. Raised at once, except to the one caller that tries again.
        """
        if self._reason is None and self._canary_lives():
            return
        with self._lock:
            if self._reason is None:
                if self._canary_lives():
                    return
                self._reason = "the connection to it was lost"
            elif self._is_trying or time.monotonic() < self._retry_at:
                raise BackendUnavailable(f"mooncake master is not used for now: {self._reason}")
            self._is_trying = True
        try:
            self._try_again()
        finally:
            self._is_trying = False

    def lost(self, error: BackendError) -> None:
        """A call found that the master does not answer."""
        with self._lock:
            self._reason = str(error)
            self._retry_at = time.monotonic() + self._retry_interval_s

    def close(self) -> None:
        """Closes the canary."""
        with self._lock:
            if self._canary is not None:
                self._canary.close()
                self._canary = None

    def _try_again(self) -> None:
        try:
            self.connect()
            error = self._ping()
            if error is not None:
                raise error
        except BackendError as error:
            self.lost(error)
            raise
        with self._lock:
            self._reason = None

    def _canary_lives(self) -> bool:
        canary = self._canary
        if canary is None:
            return self._address is None
        try:
            # The master has nothing to say here: no data is the end of the connection.
            return bool(canary.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False
