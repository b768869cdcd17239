"""Age, quota, pins and usage of a whole backend: what several of them and a rebuild make of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hicache_core.errors import BackendFull
from hicache_core.storage.base import Pins, ReportsUsage
from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import NAMESPACE, Peer, content, hits, key_of, put
from plugins.hf3fs.tests.test_rebuild import lose
from tests.scrubbing import check_scrub


def test_a_backend_pins_and_reports_its_usage(anyhow: Open) -> None:
    backend = anyhow()
    assert isinstance(backend, Pins)
    assert isinstance(backend, ReportsUsage)
    put(backend, range(3))
    assert backend.usage() == {NAMESPACE: 3000}
    assert backend.pin([key_of(0), key_of("absent")], 60) == 1
    assert backend.pin([], 60) == 0


def test_usage_and_quota_are_of_all_ranks(anyhow: Open) -> None:
    first = anyhow(rank=0, namespace_quota_nbytes=5000)
    second = anyhow(rank=1, namespace_quota_nbytes=5000)
    put(first, range(4))
    put(second, range(4, 8))
    assert first.usage() == second.usage() == {NAMESPACE: 5000}
    assert [hits(second, [n]) for n in range(8)] == [1, 0, 0, 0, 1, 1, 1, 1]
    first.check_integrity()


def test_a_full_quota_is_told(anyhow: Open) -> None:
    backend = anyhow(namespace_quota_nbytes=1500)
    with pytest.raises(BackendFull, match="namespace_quota_nbytes=1500"):
        backend.set(key_of("large"), bytes(1501))
    assert put(backend, ["a", "b"]) == 1
    assert backend.stats()["dropped_writes"] == 2


def test_objects_expire_and_are_as_old_after_a_rebuild(opened: Open, tmp_path: Path) -> None:
    backend = opened(ttl_s=60)
    put(backend, range(3))
    backend.close()
    lose(tmp_path)
    time.sleep(0.5)
    backend = opened(ttl_s=0.5)
    assert hits(backend, range(3)) == 0
    assert backend.get(key_of(0)) is None
    assert list(backend.list_keys("")) == []
    assert backend.usage() == {}
    put(backend, [0])
    assert backend.get(key_of(0)) == content(key_of(0), 1000)


def test_killed_writers_leave_bytes_that_add_up(opened: Open, peer_on: Callable[..., Peer]) -> None:
    settings = {"namespace_quota_nbytes": 40_000, "ttl_s": 60}
    backend = opened(**settings)
    for n in range(2):
        peer = peer_on(**settings)
        peer.begin("churn", f"writer {n}", 60)
        for label in range(8):
            put(backend, [f"{n} {label}"])
        peer.kill()
        assert backend.usage()[NAMESPACE] <= 40_000
        backend.check_integrity()


def test_scrubbing_removes_corrupt_and_foreign_pages(anyhow: Open) -> None:
    check_scrub(anyhow(slot_nbytes=8000), *map(key_of, range(3)))
