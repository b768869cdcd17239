"""Masters, backends on them, and second processes, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hicache_mooncake import MooncakeBackend, MooncakeConfig

from hicache_core.types import BackendContext
from tests.servers.mooncake import Master, Peer

NAMESPACE = "0123456789abcdef"
SEGMENT_NBYTES = 64 * 2**20
VARIABLES = (
    "MOONCAKE_MASTER",
    "MOONCAKE_TE_META_DATA_SERVER",
    "MOONCAKE_LOCAL_HOSTNAME",
    "MOONCAKE_GLOBAL_SEGMENT_SIZE",
    "MOONCAKE_PROTOCOL",
    "MOONCAKE_DEVICE",
)


@pytest.fixture(autouse=True)
def _no_mooncake_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """One master for every test that leaves it alone."""
    server = Master(tmp_path_factory.mktemp("mooncake"))
    yield server
    server.close()


@pytest.fixture
def make_master(tmp_path: Path) -> Iterator[Callable[..., Master]]:
    """Starts masters that a test may kill."""
    masters: list[Master] = []

    def make(**options: Any) -> Master:
        masters.append(Master(tmp_path, **options))
        return masters[-1]

    yield make
    for server in masters:
        server.close()


def new_backend(address: str, *, object_nbytes: int = 0, **options: Any) -> MooncakeBackend:
    """A backend with short limits, not open yet."""
    config = MooncakeConfig(
        **{
            "master_server_address": address,
            "global_segment_size": SEGMENT_NBYTES,
            "rpc_timeout_s": 1.0,
            "retry_interval_s": 0.2,
            **options,
        }
    )
    return MooncakeBackend(config, BackendContext(NAMESPACE, object_nbytes))


@pytest.fixture
def make_backend() -> Iterator[Callable[..., MooncakeBackend]]:
    """Opens backends and closes them."""
    backends: list[MooncakeBackend] = []

    def make(address: str, **options: Any) -> MooncakeBackend:
        backends.append(new_backend(address, **options))
        backends[-1].open()
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    """Starts peers and ends them."""
    peers: list[Peer] = []

    def make(address: str, **options: Any) -> Peer:
        config = {
            "master_server_address": address,
            "global_segment_size": SEGMENT_NBYTES,
            "require_registered": False,
            **options,
        }
        peers.append(Peer(config))
        return peers[-1]

    yield make
    for peer in peers:
        peer.stop()


@pytest.fixture(scope="session")
def _shared(master: Master) -> Iterator[MooncakeBackend]:
    opened = new_backend(master.address)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def _shared_unregistered(master: Master, _shared: MooncakeBackend) -> Iterator[MooncakeBackend]:
    opened = new_backend(master.address, global_segment_size=0)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def backend(_shared: MooncakeBackend) -> MooncakeBackend:
    """A backend on an empty store; shared by the tests, since closing one takes two seconds."""
    _shared.clear("")
    return _shared


@pytest.fixture
def unregistered(_shared_unregistered: MooncakeBackend) -> MooncakeBackend:
    """The same, for tests in which no memory is ever registered."""
    _shared_unregistered.clear("")
    return _shared_unregistered
