"""Events of groups of layers: whoever listens knows which units each tier holds."""

from __future__ import annotations

import random
import uuid
from collections import defaultdict

import pytest

from hicache_core.kv.keys import DIGEST_NBYTES
from hicache_core.kv.spec import GroupKind
from hicache_core.observe.event_format import MEDIUM
from hicache_core.observe.events import EventsConfig, KvEvents
from hicache_core.observe.journal import Journal, Journals, PageRun
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext, Tier
from tests.page_path.grouped_world import GroupedWorld, make_grouped_world
from tests.unit.observe.subscriber import Subscriber

Held = dict[tuple[Tier, int], set[bytes]]
"""Digests of the pages that have units, by tier and number of the group; 0 are full pages."""


class Listener(Journal):
    """Knows what it was told, and refuses the loss of what was never there."""

    def __init__(self) -> None:
        self.held: Held = defaultdict(set)
        self.causes: set[str] = set()

    def stored(self, tier: Tier, run: PageRun) -> None:
        self.held[tier, run.group_index].update(cut(run.digests))

    def removed(self, tier: Tier, run: PageRun, cause: str) -> None:
        known = self.held[tier, run.group_index]
        assert known.issuperset(cut(run.digests)), (tier, run.group_index, cause)
        known.difference_update(cut(run.digests))
        if run.group is not None:
            self.causes.add(cause)

    def cleared(self) -> None:
        self.held.clear()


def cut(digests: bytes) -> set[bytes]:
    return {digests[at : at + DIGEST_NBYTES] for at in range(0, len(digests), DIGEST_NBYTES)}


def listen(world: GroupedWorld, journal: Journal) -> None:
    parts = world.cache.parts
    told = [journal] if parts.journal is None else [parts.journal, journal]
    object.__setattr__(parts, "journal", Journals(told))


def units_of(world: GroupedWorld) -> Held:
    """What device and host hold of the groups, read from the holdings themselves."""
    found: Held = {}
    parts = world.cache.parts
    for number, group in enumerate(parts.groups, 1):
        device: set[bytes] = set()
        host: set[bytes] = set()
        for node in group.held.nodes():
            digests = parts.tree.digests(node)
            if group.held.group.kind is GroupKind.STATE:
                digests = digests[-DIGEST_NBYTES:]
            holding = group.held.get(node)
            assert holding is not None
            device |= cut(digests) if holding.device is not None else set()
            host |= cut(digests) if holding.host is not None else set()
        found |= {(Tier.DEVICE, number): device, (Tier.HOST, number): host}
    return found


def in_store(world: GroupedWorld, share: str) -> Held:
    """What the store holds of the groups, read from the store itself."""
    storage = world.cache.parts.storage
    assert storage is not None
    assert storage.current is not None
    store = MemoryBackend(MemoryConfig(share=share), BackendContext(""))
    store.open()
    manifests = {key for key, _ in storage.current.manifests}
    found: Held = {}
    for number, namespace in enumerate(storage.current.group_namespaces, 1):
        keys = set(store.list_keys(f"{namespace}/")) - manifests
        found[Tier.STORAGE, number] = {bytes.fromhex(key.partition("/")[2]) for key in keys}
    store.close()
    return found


def of_groups(held: Held) -> Held:
    return {key: pages for key, pages in held.items() if key[1] and pages}


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
@pytest.mark.parametrize("retention", ["keep", "free_once_stored"])
@pytest.mark.parametrize("mix", ["full and window", "full and state", "full, window and state"])
def test_who_listens_knows_what_every_tier_holds(mix: str, policy: str, retention: str) -> None:
    """Small pools, so that units leave for every reason."""
    rng = random.Random(7)
    share = uuid.uuid4().hex
    world = make_grouped_world(
        mix,
        device_pages=14,
        n_units=12,
        storage={"share": share},
        hicache_ratio=1.5,
        hicache_write_policy=policy,
        hicache_host_retention=retention,
        batch_pages=2,
    )
    listener = Listener()
    listen(world, listener)
    for _ in range(30):
        world.request([rng.randrange(2)] * rng.randrange(4, 24) + [7] * rng.randrange(12))
        if rng.random() < 0.2:
            world.flush_device()
        held = of_groups(listener.held)
        expected = of_groups(units_of(world))
        assert {key: held.get(key) for key in expected} == expected
    assert world.cache.flush(10.0)
    everything = units_of(world) | in_store(world, share)
    assert of_groups(listener.held) == of_groups(everything)
    world.close()


def test_a_flush_and_a_lost_store_are_told() -> None:
    share = uuid.uuid4().hex
    world = make_grouped_world(storage={"share": share})
    listener = Listener()
    listen(world, listener)
    world.request(range(40))
    assert world.cache.flush(10.0)
    stored = in_store(world, share)
    assert all(stored.values())
    world.cache.detach_storage()
    assert of_groups(listener.held) == of_groups(units_of(world))
    assert of_groups(listener.held)
    assert world.cache.reset()
    assert of_groups(listener.held) == {}
    assert "flushed" in listener.causes
    world.close()


def test_window_units_that_no_prefix_needs_leave_for_a_reason_of_their_own() -> None:
    world = make_grouped_world("full and window")
    listener = Listener()
    listen(world, listener)
    world.request(range(40))
    assert world.cache.flush(10.0)
    assert listener.causes == {"outside_window"}
    assert len(listener.held[Tier.DEVICE, 1]) == 2  # the last 7 of 40 tokens are on 2 pages
    assert len(listener.held[Tier.HOST, 1]) == 10
    world.close()


@pytest.mark.parametrize("groups", [True, False])
def test_events_have_the_number_of_their_group_and_none_for_full_pages(groups: bool) -> None:
    publisher = KvEvents(
        EventsConfig("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", groups=groups)
    )
    publisher.open()
    subscriber = Subscriber(publisher)
    subscriber.join(publisher)
    publisher.cleared()
    world = make_grouped_world()
    listener = Listener()
    listen(world, listener)
    listen(world, publisher)
    world.request(range(40))
    assert world.cache.flush(10.0)
    tokens = bytes(16)
    publisher.stored(Tier.STORAGE, PageRun(b"", bytes(32), tokens, b""))
    subscriber.follow_until(0)
    names = {
        (tier, number): MEDIUM[tier] + (f" {number}" if number else "")
        for tier, number in listener.held
    }
    expected = {
        names[key]: {int.from_bytes(page[:8], "big", signed=True) for page in pages}
        for key, pages in listener.held.items()
        if groups or not key[1]
    }
    told = {name: set(hashes) for name, hashes in subscriber.index.items() if name != "EXTERNAL"}
    assert told == expected
    subscriber.close()
    publisher.close()
    world.close()
