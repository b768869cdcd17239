"""A prefill and decode cluster of real processes: servers, a router, their logs and their end."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from tests.server.process import environment

PATIENCE_S = 180.0
_READY = re.compile(r"serves \S+ at (http://\S+)|Uvicorn running on (http://\S+)")


class Child:
    """A process of ours that says where it answers.

    Attributes:
        name: for people.
        url: where it answers.
        lines: what it has said.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Starts it; ``wait`` returns when it answers."""
        self.name = name
        self.url = ""
        self.lines: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait(self) -> None:
        """Returns when it answers."""
        while not self.url:
            line = self._news.get(timeout=PATIENCE_S)
            assert line is not None, f"{self.name} ended:\n" + "\n".join(self.lines)
            if found := _READY.search(line):
                self.url = found[1] or found[2]

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it without warning; a second call does nothing."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def kill_rank(self, rank: int) -> None:
        """Ends one of its other processes, and waits until it has ended itself for lack of it."""
        found = re.search(rf"rank {rank} of \d+ is process (\d+)", "\n".join(self.lines))
        assert found is not None, self.lines
        os.kill(int(found[1]), signal.SIGKILL)
        self._process.wait(PATIENCE_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self.lines.append(line.rstrip())
                self._news.put(line)
        self._news.put(None)

    def get(self, path: str) -> Any:
        """What it answers, as JSON values."""
        return httpx.get(self.url + path, timeout=30.0).raise_for_status().json()

    def call(self, method: str, path: str, **content: Any) -> httpx.Response:
        """What it answers, if that is no error."""
        answer = httpx.request(method, self.url + path, timeout=PATIENCE_S, **content)
        return answer.raise_for_status()


class Cluster:
    """Two prefill nodes, decode nodes that offload, and a router before them.

    Attributes:
        prefill: the prefill nodes.
        decodes: the decode nodes.
        router: what clients talk to.
    """

    def __init__(
        self,
        model: str,
        storage: str,
        extra: Mapping[str, Any],
        *,
        page_size: int,
        transfer: str = "tcp",
        flags: Sequence[str] = (),
        tp: tuple[Sequence[int], Sequence[int]] = ((1, 1), (1,)),
    ) -> None:
        """Starts everything and returns when all answer.

        ``tp`` says how many ranks each prefill and each decode node has.
        """
        extra_config = json.dumps({"prefetch_threshold": page_size, **extra})
        self._server = [
            *["-m", "hicache_core.launch_server", "--model-path", model],
            *["--page-size", str(page_size), "--hicache-write-policy", "write_through"],
            *["--hicache-ratio", "2", "--enable-metrics", "--enable-cache-report"],
            *["--hicache-storage-backend", storage],
            *["--hicache-storage-backend-extra-config", extra_config],
            *["--hicache-storage-prefetch-policy", "wait_complete"],
            *["--disaggregation-transfer-backend", transfer, *flags],
        ]
        self._children: list[Child] = []
        try:
            self._prefill_tp, decode_tp = tp
            self.prefill = [self._prefill(n, "0") for n in range(len(self._prefill_tp))]
            self.decodes = [
                self._start(
                    "decode",
                    [
                        *self._server,
                        *["--port", "0", "--tp", str(n_ranks), "--disaggregation-mode", "decode"],
                        "--disaggregation-decode-enable-offload-kvcache",
                    ],
                )
                for n_ranks in decode_tp
            ]
            for child in (*self.prefill, *self.decodes):
                child.wait()
            command = ["-m", "hicache_core.cli.main", "router"]
            for child in self.prefill:
                command += ["--prefill", child.url]
            for child in self.decodes:
                command += ["--decode", child.url]
            command += ["--port", "0", "--by-load"]
            self.router = self._start("router", [*command, "--health-interval", "0.3"])
            self.router.wait()
        except BaseException:
            self.close()
            raise

    @property
    def decode(self) -> Child:
        """The first decode node."""
        return self.decodes[0]

    def _prefill(self, number: int, port: str) -> Child:
        flags = ["--port", port, "--disaggregation-mode", "prefill", "--enable-hierarchical-cache"]
        flags += ["--tp", str(self._prefill_tp[number])]
        return self._start(f"prefill {number}", [*self._server, *flags])

    def _start(self, name: str, command: Sequence[str]) -> Child:
        self._children.append(Child(name, command))
        return self._children[-1]

    def kill_prefill(self, number: int) -> None:
        """Ends a prefill node without warning."""
        self.prefill[number].kill()

    def restart_prefill(self, number: int) -> None:
        """Starts it again at the same address, and waits until the router has seen it."""
        url = self.prefill[number].url
        self.prefill[number] = self._prefill(number, url.rpartition(":")[2])
        self.prefill[number].wait()
        self.wait_until(lambda: self._is_up(url), f"{url} is up again")

    def _is_up(self, url: str) -> bool:
        nodes = self.router.get("/router/status")["nodes"]
        return any(node["url"] == url and node["is_up"] for node in nodes)

    def generate(self, tokens: Sequence[int], n_new: int) -> tuple[dict[str, Any], httpx.Headers]:
        """A greedy answer through the router: SGLang's form, and the headers."""
        params = {"temperature": 0.0, "max_new_tokens": n_new, "ignore_eos": True}
        body = {"input_ids": list(tokens), "sampling_params": params}
        answer = httpx.post(self.router.url + "/generate", json=body, timeout=PATIENCE_S)
        return answer.raise_for_status().json(), answer.headers

    def settle(self) -> None:
        """Returns when no node copies or stores anything any more."""
        nodes = [node for node in (*self.prefill, *self.decodes) if node.is_alive]
        self.wait_until(lambda: all(self._is_idle(node) for node in nodes), "nodes are idle")

    def _is_idle(self, node: Child) -> bool:
        for _ in range(2):  # what has left one queue may not be in the next one yet
            seen = node.get("/hicache/status")
            snapshot, engine = seen["snapshot"], seen["engine"]
            moving = [*snapshot["jobs_in_flight"].values(), *snapshot["bytes_in_flight"].values()]
            if any(moving) or engine["waiting"] or engine["running"]:
                return False
            time.sleep(0.05)
        return True

    def figures(self, node: Child) -> dict[str, Any]:
        """What the node did with the other half."""
        figures: dict[str, Any] = node.get("/get_server_info")["disaggregation"]
        return figures

    @staticmethod
    def wait_until(condition: Any, what: str) -> None:
        """Looks until ``condition`` holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to this: {what}"
            time.sleep(0.05)

    def close(self) -> None:
        """Ends every process that was started."""
        for child in self._children:
            child.kill()
