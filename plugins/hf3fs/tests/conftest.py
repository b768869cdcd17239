"""Backends in each mode and on each metadata store; whatever a test opens is closed after it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hicache_hf3fs import Hf3fsBackend
from hicache_hf3fs.config import ENVIRONMENT

from hicache_core.process.logs import forget_logged
from plugins.hf3fs.tests.helpers import EMULATION, Peer, new_backend
from tests.servers.valkey import Valkey

Open = Callable[..., Hf3fsBackend]


def pytest_configure(config: pytest.Config) -> None:
    """The marker of this plugin."""
    config.addinivalue_line("markers", "real_3fs: needs a mount of real 3FS and its client")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    forget_logged()


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """A server for all tests that leave it as it is; each has a prefix, so a store, of its own."""
    server = Valkey()
    yield server
    server.close()


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A server of the test alone, which it may break."""
    server = Valkey()
    yield server
    server.close()


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The emulation of ``hf3fs_fuse.io``, with a mount at ``tmp_path``; the module."""
    monkeypatch.syspath_prepend(EMULATION)
    monkeypatch.setenv("HF3FS_EMULATION_MOUNT", str(tmp_path))
    module = importlib.import_module("hf3fs_fuse.io")
    with module.no_rule_broken():
        yield module
    for name in ("hf3fs_fuse.io", "hf3fs_fuse"):
        sys.modules.pop(name, None)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens backends under one prefix and closes them after the test."""
    backends: list[Hf3fsBackend] = []

    def open_backend(**settings: Any) -> Hf3fsBackend:
        backends.append(new_backend(settings.pop("prefix", tmp_path / "kv"), **settings))
        backends[-1].open()
        return backends[-1]

    yield open_backend
    for backend in backends:
        backend.close()


@pytest.fixture
def peer_on(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    """Starts second processes and ends them after the test."""
    peers: list[Peer] = []

    def start(**settings: Any) -> Peer:
        peers.append(Peer(tmp_path / "kv", **settings))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


@pytest.fixture(params=["posix sqlite", "posix redis", "usrbio sqlite"])
def anyhow(request: pytest.FixtureRequest) -> Open:
    """Opens backends, in each mode and on each metadata store."""
    mode, metadata = request.param.split()
    fixed: dict[str, Any] = {"mode": mode}
    if mode == "usrbio":
        request.getfixturevalue("emulation")
    if metadata == "redis":
        fixed["metadata_url"] = request.getfixturevalue("valkey").url
    opened: Open = request.getfixturevalue("opened")  # after the emulation, so it is closed before

    def open_backend(**settings: Any) -> Hf3fsBackend:
        return opened(**fixed, **settings)

    return open_backend
