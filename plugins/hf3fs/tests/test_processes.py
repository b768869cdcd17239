"""Two processes on one store, in POSIX mode for real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import Peer, hits, new_backend, put
from tests.servers.valkey import Valkey

Start = Callable[..., Peer]


@pytest.fixture(params=["sqlite", "redis"])
def settings(request: pytest.FixtureRequest, valkey: Valkey) -> dict[str, Any]:
    """On each metadata store."""
    return {"metadata_url": valkey.url} if request.param == "redis" else {}


def test_two_processes_read_what_the_other_has_stored(
    opened: Open, peer_on: Start, settings: dict[str, Any]
) -> None:
    backend, peer = opened(**settings), peer_on(rank=1, **settings)
    assert put(backend, ["a", "b"]) == 2
    assert peer.ask("hits", ["a", "b"]) == 2
    assert peer.ask("put", ["c"]) == 1
    assert hits(backend, ["a", "b", "c"]) == 3


def test_backends_that_open_at_once_share_one_slab(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The index and the slab are made by whoever is first, while the others wait."""
    backends = [new_backend(tmp_path / "kv", **settings) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda backend: backend.open(), backends))
    for n, backend in enumerate(backends):
        assert put(backend, [n]) == 1
    for backend in backends:
        assert hits(backend, range(6)) == 6
        backend.check_integrity()
        backend.close()


def test_two_processes_churn_in_one_slab_without_mixing_bytes(
    opened: Open, peer_on: Start, settings: dict[str, Any]
) -> None:
    """Both evict all the time; ``hits`` fails on any wrong byte, in either process."""
    small = {"file_size": 48 * 4096, "lease_s": 0.02, **settings}
    backend = opened(**small)
    peers = [peer_on(**small) for _ in range(2)]
    rounds: list[int] = []
    threads = [
        threading.Thread(target=lambda p=p, n=n: rounds.append(p.ask("churn", n, 1.0)))
        for p, n in zip(peers, "ab", strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rounds) == 2
    assert min(rounds) > 3
    backend.check_integrity()


def test_a_writer_killed_between_reserve_and_publish_leaves_no_object_and_no_lost_slot(
    opened: Open, peer_on: Start, settings: dict[str, Any]
) -> None:
    small = {"file_size": 4 * 4096, "write_lease_s": 0.3, **settings}
    backend, peer = opened(**small), peer_on(**small)
    assert peer.ask("reserve", ["a", "b", "c"]) == 3
    peer.kill()
    assert hits(backend, ["a"]) == 0
    assert put(backend, ["d", "e"]) == 1, "the dead writer's slots are not free yet"
    threading.Event().wait(0.4)
    assert put(backend, ["f", "g", "h"]) == 3
    assert hits(backend, ["d", "f", "g", "h"]) == 4
    backend.check_integrity()
