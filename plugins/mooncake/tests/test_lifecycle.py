"""Pins, usage and listing on a real master, whose memory is small and lent by another process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hicache_mooncake import MooncakeBackend, MooncakeConfig
from hicache_mooncake.admin import Admin

from hicache_core.errors import BackendCorrupt, BackendError, BackendUnavailable
from hicache_core.storage.base import Listable, Pins, ReportsUsage
from plugins.mooncake.tests.conftest import NAMESPACE
from tests.scrubbing import check_scrub
from tests.servers.mooncake import Master, Peer
from tests.servers.process import free_port

NBYTES = 256 << 10
OTHER = NAMESPACE[::-1]
Make = Callable[..., MooncakeBackend]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master with short leases and a process that lends it 32 MiB, room for 128 objects."""
    master = Master(tmp_path_factory.mktemp("lifecycle"), lease_ms=300)
    try:
        peer = Peer({"master_server_address": master.address, "global_segment_size": 32 << 20})
        yield master
        peer.stop()
    finally:
        master.close()


@pytest.fixture
def on_small(small: Master, make_backend: Make) -> MooncakeBackend:
    """A backend on it that lends nothing, the store empty."""
    backend = make_backend(
        small.address, global_segment_size=0, master_metrics_port=small.metrics_port
    )
    backend.clear("")
    return backend


def key_of(n: int, namespace: str = NAMESPACE) -> str:
    return f"{namespace}/{n:064x}"


def content(key: str) -> bytes:
    return key.encode() * (NBYTES // len(key)) + b"x" * (NBYTES % len(key))


def put(backend: MooncakeBackend, keys: list[str]) -> None:
    """Stores objects, each as soon as the master has made room for it."""
    for key in keys:
        deadline = time.monotonic() + 10
        while not backend.batch_set([key], [(memoryview(content(key)),)]):
            assert time.monotonic() < deadline, "the master makes no room"
            time.sleep(0.02)


def churn(backend: MooncakeBackend, first: int) -> None:
    """Stores more than twice what there is room for."""
    put(backend, [key_of(n) for n in range(first, first + 300)])


def test_the_backend_has_all_three(on_small: MooncakeBackend) -> None:
    assert isinstance(on_small, Pins)
    assert isinstance(on_small, ReportsUsage)
    assert isinstance(on_small, Listable)


def test_pinned_objects_outlive_younger_ones_until_their_pins_end(
    on_small: MooncakeBackend,
) -> None:
    pinned = [key_of(n) for n in range(4)]
    short, ended = key_of(4), key_of(5)
    put(on_small, [*pinned, short, ended, *(key_of(n) for n in range(6, 20))])
    assert on_small.pin([*pinned, ended, "absent"], 3600) == 5
    assert on_small.pin([short], 0.5) == 1
    assert on_small.pin([ended, "absent"], 0) == 1
    time.sleep(0.6)
    churn(on_small, 1000)
    for key in pinned:
        assert on_small.get(key) == content(key)
    assert not on_small.exists(short), "its pin is over"
    assert not on_small.exists(ended), "its pin was ended"
    on_small.delete(pinned)
    assert not any(map(on_small.exists, pinned)), "a pin does not keep from deleting"


def test_when_all_is_pinned_pinned_objects_make_room(on_small: MooncakeBackend) -> None:
    keys = [key_of(n) for n in range(160)]
    for key in keys:
        put(on_small, [key])
        on_small.pin([key], 3600)
    assert sum(map(on_small.exists, keys)) < 130
    assert on_small.exists(keys[-1])


def test_an_object_larger_than_the_staging_buffer_cannot_be_pinned(
    small: Master, on_small: MooncakeBackend, make_backend: Make
) -> None:
    put(on_small, [key_of(0)])
    tight = make_backend(small.address, global_segment_size=0, staging_nbytes=NBYTES - 1)
    with pytest.raises(BackendError, match="staging_nbytes"):
        tight.pin([key_of(0)], 60)
    assert on_small.get(key_of(0)) == content(key_of(0))


def test_usage_is_by_namespace_and_listing_by_prefix(on_small: MooncakeBackend) -> None:
    mine, others = [key_of(n) for n in range(70)], [key_of(n, OTHER) for n in range(3)]
    put(on_small, [*mine, *others])
    assert dict(on_small.usage()) == {NAMESPACE: 70 * NBYTES, OTHER: 3 * NBYTES}
    assert sorted(on_small.list_keys(f"{NAMESPACE}/")) == mine
    assert list(on_small.list_keys(others[1])) == [others[1]]
    on_small.delete(mine[:1])
    assert on_small.usage()[NAMESPACE] == 69 * NBYTES
    on_small.clear("")
    assert dict(on_small.usage()) == {}
    assert list(on_small.list_keys("")) == []


def test_usage_and_listing_lease_nothing(on_small: MooncakeBackend) -> None:
    """What was leased could not be removed without force."""
    put(on_small, [key_of(0)])
    on_small.usage()
    list(on_small.list_keys(""))
    time.sleep(0.4)  # writing it leased it, perhaps
    on_small.usage()
    with on_small.client.using() as store:
        assert store.remove(key_of(0)) == 0


def test_a_wrong_port_is_told(small: Master, make_backend: Make) -> None:
    backend = make_backend(small.address, global_segment_size=0, master_metrics_port=free_port())
    with pytest.raises(BackendUnavailable, match="set master_metrics_port"):
        backend.list_keys("")
    with pytest.raises(BackendUnavailable, match="set master_metrics_port"):
        backend.usage()


@pytest.mark.parametrize(
    "settings", [{"master_server_address": "etcd://a,b"}, {"tenant_id": "team"}]
)
def test_several_masters_and_other_tenants_are_not_listed(settings: dict[str, str]) -> None:
    config = MooncakeConfig(**{"master_server_address": "127.0.0.1:1", **settings})
    with pytest.raises(BackendError, match="one master and its default tenant"):
        Admin(config).keys("")


def test_an_answer_that_is_none_is_told(small: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = Admin(MooncakeConfig(master_server_address=small.address))
    monkeypatch.setattr(admin, "_ask", lambda _: b"<html>")
    with pytest.raises(BackendCorrupt, match="<html>"):
        list(admin.sizes(iter(["ns/key"])))


def test_an_unknown_address_is_told(small: Master, tmp_path: Path) -> None:
    config = MooncakeConfig(
        master_server_address=small.address, master_metrics_port=small.metrics_port
    )
    admin = Admin(config)
    with pytest.raises(BackendError, match="answers 404"):
        admin._ask(f"/{tmp_path.name}")


def test_scrubbing_removes_corrupt_and_foreign_pages(on_small: MooncakeBackend) -> None:
    check_scrub(on_small, *map(key_of, range(3)))
