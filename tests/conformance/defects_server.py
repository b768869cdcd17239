"""The right client of the small server, and wrong ones; each docstring names the rule."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

from hicache_core.errors import BackendError, BackendTimeout, BackendUnavailable, UseAfterClose
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.segments import scatter
from hicache_core.types import BackendContext, Page
from tests.conformance.tcp_store import ANSWER, REQUEST, receive


class TcpConfig(BackendConfig):
    """Settings of the client."""

    port: int
    timeout_s: float = 0.25


class TcpBackend(StorageBackend):
    """Right: one connection under a lock, dropped after every error."""

    name: ClassVar[str] = "tcp"
    Config: ClassVar[type[BackendConfig]] = TcpConfig

    def __init__(self, config: TcpConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self.settings = config
        self.lock = threading.Lock()
        self.is_open = False
        self.sock: socket.socket | None = None

    def open(self) -> None:
        if not self.is_open:
            self.sock = self.connect()
            self.is_open = True

    def close(self) -> None:
        self.is_open = False
        self.drop()

    def drop(self) -> None:
        """Closes the connection; the next call makes a new one."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def connect(self) -> socket.socket:
        """A new connection."""
        try:
            address = ("127.0.0.1", self.settings.port)
            return socket.create_connection(address, self.settings.timeout_s)
        except OSError as error:
            raise BackendUnavailable(f"no server at port {self.settings.port}") from error

    def ask(self, op: bytes, key: str, value: Buffer = b"") -> tuple[bool, bytes]:
        """One request and its answer."""
        if not self.is_open:
            raise UseAfterClose("the backend is not open")
        with self.lock:
            try:
                self.sock = self.sock or self.connect()
                request = REQUEST.pack(op, len(key), len(value)) + key.encode()
                self.sock.sendall(request + bytes(value))
                found, nbytes = ANSWER.unpack(receive(self.sock, ANSWER.size))
                return found, receive(self.sock, nbytes)
            except TimeoutError as error:
                self.after_error()
                raise BackendTimeout("no answer in time") from error
            except BackendError:
                raise
            except OSError as error:
                self.after_error()
                raise BackendUnavailable("the connection was lost") from error

    def after_error(self) -> None:
        """What is done with the connection that failed."""
        self.drop()

    def get(self, key: str) -> Buffer | None:
        found, value = self.ask(b"g", key)
        return value if found else None

    def exists(self, key: str) -> bool:
        return self.ask(b"e", key)[0]

    def set(self, key: str, value: Buffer) -> None:
        self.ask(b"s", key, value)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.ask(b"d", key)


class LostIsAMiss(TcpBackend):
    """dead_server"""

    def get(self, key: str) -> Buffer | None:
        try:
            return super().get(key)
        except BackendUnavailable as error:
            if isinstance(error, BackendTimeout):
                raise
            return None


class OpensLater(TcpBackend):
    """open_without_server"""

    def open(self) -> None:
        self.is_open = True


class NeverConnectsAgain(TcpBackend):
    """restarted_server"""

    lost = False

    def connect(self) -> socket.socket:
        if self.lost:
            raise BackendUnavailable("the connection was lost before")
        try:
            return super().connect()
        except BackendUnavailable:
            self.lost = self.is_open
            raise


class WaitsForEver(TcpBackend):
    """frozen_server"""

    def connect(self) -> socket.socket:
        sock = super().connect()
        sock.settimeout(None)
        return sock


class KeepsTheConnection(TcpBackend):
    """thawed_server"""

    def ask(self, op: bytes, key: str, value: Buffer = b"") -> tuple[bool, bytes]:
        try:
            return super().ask(op, key, value)
        except BackendUnavailable:
            self.drop()
            raise

    def after_error(self) -> None:
        """Goes on with it, late answers and all."""


class FillsLater(TcpBackend):
    """page_left_alone_after_error"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        try:
            return super().batch_get(keys, pages)
        except BackendTimeout:
            threading.Thread(target=self.fill, args=(keys[0], pages[0]), daemon=True).start()
            raise

    def fill(self, key: str, page: Page) -> None:
        """Tries until the server answers, though nobody waits any more."""
        for _ in range(100):
            time.sleep(0.02)
            with contextlib.suppress(BackendError, UseAfterClose):
                value = self.get(key)
                if value is not None:  # or the rule has ended, and its keys are gone
                    scatter(value, page)
                return


class CountsWhatItLost(TcpBackend):
    """killed_in_mid_batch"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        try:
            return super().batch_get(keys, pages)
        except BackendUnavailable:
            if len(keys) > 2:
                return len(keys)
            raise


class CountsWhatIsLate(TcpBackend):
    """frozen_in_mid_batch"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        try:
            return super().batch_get(keys, pages)
        except BackendTimeout:
            if len(keys) > 2:
                return len(keys)
            raise


DEFECTS = [cls for cls in list(TcpBackend.__subclasses__())]
