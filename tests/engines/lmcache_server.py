"""LMCache's server as a child process, and how vLLM finds it."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.engines.child import Group
from tests.engines.environments import VLLM, program, variables
from tests.servers.process import free_port

CHUNK_TOKENS = 256


class LMCacheServer(Group):
    """A server with one L2 adapter.

    Attributes:
        transfer: the ``kv_transfer_config`` of a vLLM in front of it.
    """

    def __init__(self, folder: Path, adapter: Mapping[str, Any]) -> None:
        """Starts it, and returns at once.

        Args:
            folder: gets its log.
            adapter: value of ``--l2-adapter``.
        """
        port, http = free_port(), free_port()
        command = [
            program(VLLM, "lmcache"), "server",
            "--host", "127.0.0.1", "--port", str(port),
            "--http-host", "127.0.0.1", "--http-port", str(http),
            "--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", "0.5", "--eviction-policy", "LRU",
            "--supported-transfer-mode", "auto",  # the default has no way to an engine on a CPU
            "--disable-observability", "--disable-metrics",
            "--l2-adapter", json.dumps(adapter),
        ]  # fmt: skip
        super().__init__(command, variables(VLLM, {}), folder / f"lmcache-{port}.log")
        self._http = f"http://127.0.0.1:{http}"
        where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        self.transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_extra_config": where,
        }

    def serves(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self._http}/healthcheck", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def forget(self) -> None:
        """Empties its memory, L1; what the adapter stored stays."""
        asked = urllib.request.Request(f"{self._http}/cache/clear", b"{}", method="POST")
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=10):
            pass


@contextlib.contextmanager
def lmcache_server(folder: Path, adapter: Mapping[str, Any]) -> Iterator[LMCacheServer]:
    """A server that serves; killed at the end. Arguments as for ``LMCacheServer``."""
    server = LMCacheServer(folder, adapter)
    try:
        server.wait(server.serves)
        yield server
    finally:
        server.kill()
