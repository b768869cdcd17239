"""One Mooncake client: loaded when needed, set up with a time limit, never called after close."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hicache_core.errors import BackendError, BackendUnavailable, BrokenBackend, UseAfterClose
from hicache_mooncake.config import MooncakeConfig, split_address
from hicache_mooncake.environment import variables
from hicache_mooncake.errors import OK, OUTAGES, failure
from hicache_mooncake.liveness import Liveness

logger = logging.getLogger(__name__)

PING_KEY = "hicache/ping"
CLOSE_WAIT_S = 5.0
INSTALL = (
    "install Mooncake's client with `pip install 'hicache-mooncake[cpu]'` (no GPU libraries) or "
    "`pip install 'hicache-mooncake[cuda]'`; both need libibverbs: `apt-get install libibverbs1`"
)


class Store(Protocol):
    """The part of ``mooncake.store.MooncakeDistributedStore`` that this plugin uses."""

    def setup(self, *args: Any, **kwargs: Any) -> int: ...
    def close(self) -> int: ...
    def get_hostname(self) -> str: ...
    def register_buffer(self, address: int, size: int) -> int: ...
    def unregister_buffer(self, address: int) -> int: ...
    def is_exist(self, key: str) -> int: ...
    def batch_is_exist(self, keys: list[str]) -> list[int]: ...
    def batch_get_session_start(self, keys: list[str]) -> list[int]: ...
    def batch_get_session_end(self, keys: list[str]) -> int: ...
    def get_size(self, key: str) -> int: ...
    def remove(self, key: str, force: bool = ...) -> int: ...
    def batch_remove(self, keys: list[str], force: bool = ...) -> list[int]: ...
    def remove_by_regex(self, pattern: str, force: bool = ...) -> int: ...

    def batch_get_into(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        # docstring inherited: the interface is Mooncake's
        ...

    def batch_get_into_multi_buffers(
        self, keys: list[str], addresses: list[list[int]], sizes: list[list[int]]
    ) -> list[int]:
        # docstring inherited: the interface is Mooncake's
        ...

    def batch_put_from(
        self, keys: list[str], addresses: list[int], sizes: list[int], config: Any
    ) -> list[int]:
        # docstring inherited: the interface is Mooncake's
        ...

    def upsert_from(self, key: str, address: int, size: int, config: Any) -> int:
        # docstring inherited: the interface is Mooncake's
        ...

    def batch_put_from_multi_buffers(
        self, keys: list[str], addresses: list[list[int]], sizes: list[list[int]], config: Any
    ) -> list[int]:
        # docstring inherited: the interface is Mooncake's
        ...


def load_library() -> Any:
    """The module ``mooncake.store``.

    It would tell on standard error of each step that went well, so it logs warnings and errors,
    unless the environment says otherwise when it is loaded.

    Raises:
        BrokenBackend: it is not installed or does not load; the message says how to install it.
    """
    level = os.environ.get("MC_LOG_LEVEL", "WARNING")
    try:
        with variables(MC_LOG_LEVEL=level):
            return importlib.import_module("mooncake.store")
    except ImportError as error:
        raise BrokenBackend(f"mooncake.store does not load ({error}); {INSTALL}") from error


def _limits(rpc_timeout_s: float) -> contextlib.AbstractContextManager[None]:
    """Sets Mooncake's own limits, which it reads from the environment during set-up only."""
    return variables(
        MC_RPC_TIMEOUT_MS=max(1, round(rpc_timeout_s * 1000)),
        MC_STORE_CLIENT_SETUP_RETRIES=1,
    )


class Client:
    """Guards a ``MooncakeDistributedStore`` against what crashes or blocks it.

    A call before ``setup`` or after ``close`` is a segmentation fault, so ``using`` counts the
    calls in flight and ``close`` waits for them. Data and metadata calls release the interpreter's
    lock; ``setup`` and ``close`` hold it.
    """

    def __init__(self, config: MooncakeConfig) -> None:
        self.config = config
        self._store: Store | None = None
        self._idle = threading.Condition()
        self._n_in_flight = 0
        self._closing = False
        self._liveness = Liveness(
            split_address(config.master_server_address),
            connect_timeout_s=config.connect_timeout_s,
            retry_interval_s=config.retry_interval_s,
            ping=self._ping,
        )
        self.replication: Any = None
        self._library: Any = None

    def check_reachable(self) -> None:
        """Loads the library, and connects to the master for a moment; sets up nothing.

        Raises:
            BrokenBackend: Mooncake's client is not installed.
            BackendUnavailable: no master answers within the limits.
        """
        load_library()
        self._liveness.connect()
        self._liveness.close()

    def open(self) -> None:
        """Connects to the master, tries the set-up in a child process, then sets up here.

        Raises:
            BrokenBackend: Mooncake's client is not installed.
            BackendUnavailable: no master answers within the limits.
        """
        library = load_library()
        facing = self._liveness.connect()
        hostname = self.config.local_hostname or facing or socket.gethostname()
        try:
            self._try_setup(hostname)
            store: Store = library.MooncakeDistributedStore()
            with _limits(self.config.rpc_timeout_s):
                args, kwargs = self._arguments(hostname, self.config.global_segment_size)
                code = store.setup(*args, **kwargs)
            if code != OK:
                raise self._setup_failed(f"code {code}")
        except BaseException:
            self._liveness.close()
            raise
        self.replication = self._replicate_config(library)
        self._library = library
        self._store, self._closing = store, False

    def close(self, release_memory: Callable[[], None]) -> None:
        """Waits for running calls, unregisters memory and closes the store.

        Mooncake's close holds the interpreter's lock: 0.5 to 0.8 s, up to 6 s with a dead master.
        """
        with self._idle:
            self._closing = True
            settled = self._idle.wait_for(lambda: self._n_in_flight == 0, CLOSE_WAIT_S)
        self._liveness.close()
        store = self._store
        if store is None:
            return
        if settled:
            release_memory()
            self._store = None
            store.close()
            return
        # To close it under a running call would crash the process.
        self._store = None
        _abandoned.append((store, release_memory))
        logger.warning(
            "mooncake client left open: %d calls still run after %.0f s; its memory stays until "
            "the process ends",
            self._n_in_flight,
            CLOSE_WAIT_S,
        )

    @contextlib.contextmanager
    def using(self) -> Iterator[Store]:
        """Yields the store; it is not closed before the block ends.

        Raises:
            UseAfterClose: the client is not open.
            BackendError: the master is lost.
        """
        with self._idle:
            store = self._opened()
            if self._closing:
                raise UseAfterClose("the mooncake backend is closed")
            self._n_in_flight += 1
        try:
            self._liveness.check()
            yield store
        finally:
            with self._idle:
                self._n_in_flight -= 1
                if not self._n_in_flight:
                    self._idle.notify_all()

    def register(self, address: int, size: int) -> None:
        """Announces memory to the transport.

        Raises:
            BackendError: it refused; RDMA needs a large enough ``ulimit -l``.
        """
        code = self._opened().register_buffer(address, size)
        if code != OK:
            raise BackendError(
                f"mooncake refused to register {size} bytes at {address:#x} (code {code}); with "
                "rdma, raise the limit of locked memory (ulimit -l)"
            )

    def unregister(self, address: int) -> None:
        """Withdraws memory from the transport."""
        self._opened().unregister_buffer(address)

    def error(self, code: int, action: str) -> BackendError:
        """Returns the error for ``code``; after an outage, further calls fail at once."""
        error = failure(code, action, self.config.master_server_address)
        if code in OUTAGES:
            self._liveness.lost(error)
        return error

    def pinning(self, ttl_s: float) -> Any:
        """As ``replication``, for objects pinned for ``ttl_s`` seconds; 0 for not pinned."""
        replication = self._replicate_config(self._library)
        action = self._library.SoftPinAction
        replication.soft_pin_action = action.ENABLE if ttl_s > 0 else action.DISABLE
        if ttl_s > 0:
            replication.soft_pin_ttl_ms = max(1, round(ttl_s * 1000))
        return replication

    def ping_s(self) -> float:
        """Returns the seconds that the master takes to answer."""
        with self.using() as store:
            start = time.perf_counter()
            code = store.is_exist(PING_KEY)
            elapsed_s = time.perf_counter() - start
        if code < 0:
            raise self.error(code, "ping")
        return elapsed_s

    def _opened(self) -> Store:
        if self._store is None:
            raise UseAfterClose("the mooncake backend is not open; call open() first")
        return self._store

    def _ping(self) -> BackendError | None:
        code = self._opened().is_exist(PING_KEY)
        master = self.config.master_server_address
        return failure(code, "ping", master) if code < 0 else None

    def _arguments(self, hostname: str, segment: int) -> tuple[list[object], dict[str, object]]:
        config = self.config
        args: list[object] = [
            hostname,
            config.metadata_server,
            segment,
            0,  # no buffer of the client's own: pages go to and from registered memory
            config.protocol,
            config.device_name,
            config.master_server_address,
        ]
        tenant: dict[str, object] = {"tenant_id": config.tenant_id}
        return args, {} if config.tenant_id == "default" else tenant

    def _try_setup(self, hostname: str) -> None:
        """Sets up a client in a child process (0.1 s), which is killed after the time limit."""
        args, kwargs = self._arguments(hostname, 0)
        with _limits(self.config.rpc_timeout_s):
            environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            trial = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("trial.py"))],
                input=json.dumps({"args": args, "kwargs": kwargs}),
                env=environment,
                timeout=self.config.setup_timeout_s,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise self._setup_failed(
                f"no answer within {self.config.setup_timeout_s:g} s; is it a mooncake_master that "
                "listens there?"
            ) from error
        lines = trial.stdout.splitlines()
        answer = json.loads(lines[-1]) if lines else {"error": f"it ended with {trial.returncode}"}
        if answer.get("code") != OK:
            what = answer.get("error") or f"code {answer['code']}"
            last_words = (trial.stderr.splitlines() or [""])[-1]
            raise self._setup_failed(f"{what}; its last words: {last_words[:300]}")

    def _setup_failed(self, what: str) -> BackendUnavailable:
        config = self.config
        return BackendUnavailable(
            f"mooncake client could not be set up with master {config.master_server_address}, "
            f"metadata server {config.metadata_server}, protocol {config.protocol}: {what}"
        )

    def _replicate_config(self, library: Any) -> Any:
        config = self.config
        replication = library.ReplicateConfig()
        replication.replica_num = config.replica_num
        if config.soft_pin:
            replication.soft_pin_action = library.SoftPinAction.ENABLE
            if config.soft_pin_ttl_s is not None:
                replication.soft_pin_ttl_ms = round(config.soft_pin_ttl_s * 1000)
        if config.preferred_segment is not None:
            replication.preferred_segment = config.preferred_segment
        return replication


_abandoned: list[tuple[Store, Callable[[], None]]] = []
"""Clients that were closed under a call that did not return, and what holds their memory; never
released, to avoid a crash."""
