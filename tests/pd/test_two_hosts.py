"""Two hosts, which are network namespaces: servers that listen on 0.0.0.0 find each other."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREFILL, DECODE = "10.213.77.1", "10.213.77.2"
WAIT_S = 60


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=WAIT_S)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces with a cable between them; neither has a route to anywhere."""
    if shutil.which("ip") is None:
        pytest.skip("no command ip: apt-get install iproute2")
    names = (f"hicache-p{os.getpid()}", f"hicache-d{os.getpid()}")
    cable = (f"hcp{os.getpid()}", f"hcd{os.getpid()}")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
        for name, end, address in zip(names, cable, (PREFILL, DECODE), strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was not made
                _ip("netns", "del", name)


def _on(host: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "tests.pd.one_host", *arguments],
        cwd=ROOT,
        env={**os.environ, "MC_LOG_LEVEL": "ERROR"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("backend", ["tcp", "mooncake"])
def test_kv_moves_between_hosts_that_listen_on_all_addresses(
    hosts: tuple[str, str], backend: str
) -> None:
    if backend == "mooncake" and importlib.util.find_spec("mooncake") is None:
        pytest.skip("Mooncake's client is not installed")
    with _on(hosts[0], "prefill", backend) as prefill:
        assert prefill.stdout is not None
        port = prefill.stdout.readline().strip()
        assert port, "the prefill host ended"
        with _on(hosts[1], "decode", backend, PREFILL, port) as decode:
            answer, _ = decode.communicate(timeout=WAIT_S)
        prefill.communicate(timeout=WAIT_S)
    assert json.loads(answer) == {"state": "arrived", "error": "", "same": True}
