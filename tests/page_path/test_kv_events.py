"""KV events of a real cache: a subscriber knows exactly what each tier holds."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.kv.keys import pack_tokens, page_digests
from hicache_core.observe.event_format import block_hashes
from hicache_core.observe.events import EventsConfig, KvEvents
from hicache_core.observe.journal import Journal, Journals, PageRun
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext, Namespace, Tier
from tests.page_path.world import PAGE_SIZE, World, ids, make_world
from tests.unit.observe.subscriber import Subscriber

MARK = PageRun(b"", page_digests(pack_tokens([9] * 4), 4), pack_tokens([9] * 4), b"")
STEPS = st.lists(
    st.tuples(
        st.integers(1, 4),  # which chain of tokens
        st.integers(1, 7),  # how many pages of it
        st.integers(1, 3),  # its last page
        st.booleans(),  # whether the device is emptied afterwards
    ),
    min_size=1,
    max_size=25,
)


def tell(world: World, journal: Journal) -> None:
    """Has the cache tell ``journal`` too."""
    parts = world.cache.parts
    told = [journal] if parts.journal is None else [parts.journal, journal]
    object.__setattr__(parts, "journal", Journals(told))


def held(world: World) -> dict[str, set[int]]:
    """What device and host hold, read from the tree itself."""
    tree = world.cache.parts.tree
    found: dict[str, set[int]] = {"GPU": set(), "CPU_PINNED": set()}
    for node in tree.nodes():
        hashes = block_hashes(tree.digests(node))
        if node.on_device:
            found["GPU"].update(hashes)
        if node.on_host:
            found["CPU_PINNED"].update(hashes)
    return found


def in_store(share: str) -> set[int]:
    """What the store holds, read from the store itself."""
    store = MemoryBackend(MemoryConfig(share=share), BackendContext(""))
    store.open()
    keys = list(store.list_keys(""))
    store.close()
    return {block_hashes(bytes.fromhex(key.partition("/")[2]))[0] for key in keys}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[KvEvents, Subscriber]]:
    publisher = KvEvents(EventsConfig("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*"))
    publisher.open()
    subscriber = Subscriber(publisher)
    subscriber.join(publisher)
    yield publisher, subscriber
    subscriber.close()
    publisher.close()


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
@settings(deadline=None, max_examples=10)
@given(steps=STEPS)
def test_a_subscriber_knows_what_every_tier_holds(
    pair: tuple[KvEvents, Subscriber], policy: str, steps: list[tuple[int, int, int, bool]]
) -> None:
    publisher, subscriber = pair
    publisher.cleared()
    share = uuid.uuid4().hex
    world = make_world(
        device_pages=12, ratio=1.5, storage={"share": share}, hicache_write_policy=policy
    )
    tell(world, publisher)
    for chain, n_pages, last, empties_device in steps:
        world.request([chain] * ((n_pages - 1) * PAGE_SIZE) + [last] * PAGE_SIZE)
        if empties_device:
            world.flush_device()
    assert world.cache.flush(10.0)
    publisher.stored(Tier.HOST, MARK)
    (mark,) = block_hashes(MARK.digests)
    subscriber.follow_until(mark)
    subscriber.index["CPU_PINNED"].discard(mark)
    expected = held(world) | {"EXTERNAL": in_store(share)}
    assert {medium: subscriber.index[medium] for medium in expected} == expected
    world.close()


def followed(publisher: KvEvents, subscriber: Subscriber) -> dict[str, set[int]]:
    """What the subscriber believes of each medium, once it has heard everything."""
    publisher.stored(Tier.HOST, MARK)
    (mark,) = block_hashes(MARK.digests)
    subscriber.follow_until(mark)
    subscriber.index["CPU_PINNED"].discard(mark)
    return {medium: set(hashes) for medium, hashes in subscriber.index.items() if hashes}


@pytest.fixture
def told(pair: tuple[KvEvents, Subscriber]) -> Iterator[tuple[World, str]]:
    """A world whose two prefixes, one salted, are on all tiers, and the name of its store."""
    publisher, _ = pair
    publisher.cleared()
    share = uuid.uuid4().hex
    world = make_world(storage={"share": share})
    tell(world, publisher)
    world.request(ids(33))
    world.salt = Namespace(cache_salt="tenant")
    world.request(ids(17))
    assert world.cache.flush(10.0)
    yield world, share
    world.close()


def test_after_a_flush_routers_still_know_what_storage_has(
    pair: tuple[KvEvents, Subscriber], told: tuple[World, str]
) -> None:
    world, share = told
    assert set(followed(*pair)) == {"GPU", "CPU_PINNED", "EXTERNAL"}
    assert world.cache.reset()
    stored = in_store(share)
    assert len(stored) >= 12
    assert followed(*pair) == {"EXTERNAL": stored}


def test_a_flush_that_cannot_be_done_tells_nothing(
    pair: tuple[KvEvents, Subscriber], told: tuple[World, str]
) -> None:
    world, _ = told
    before = followed(*pair)
    match = world.cache.match_prefix(pack_tokens(ids(17)), world.salt, touch=False)
    world.cache.lock(match.node)
    assert not world.cache.reset()
    world.cache.unlock(match.node)
    assert followed(*pair) == before


@pytest.mark.parametrize("way", ["clear", "detach"])
def test_what_storage_gives_no_more_is_forgotten_and_the_rest_stays(
    pair: tuple[KvEvents, Subscriber], told: tuple[World, str], way: str
) -> None:
    world, _ = told
    if way == "clear":
        clearing = world.cache.clear_storage()
        while not clearing.done:
            world.cache.wait(0.01)
            world.cache.poll()
    else:
        world.cache.detach_storage()
    assert followed(*pair) == held(world)


def test_a_page_is_told_with_the_names_of_its_namespace_on_every_tier(
    pair: tuple[KvEvents, Subscriber], told: tuple[World, str]
) -> None:
    """Also where another process stored it, and this one has only read it."""
    publisher, subscriber = pair
    _, share = told
    followed(*pair)
    reader = make_world(storage={"share": share})
    tell(reader, publisher)
    reader.salt = Namespace(cache_salt="tenant")
    start_seq = subscriber.next_seq
    assert reader.request(ids(17)).storage == 16
    assert reader.cache.flush(10.0)
    followed(*pair)
    batches = [batch for _, batch in subscriber.replayed(start_seq)]
    events = [event for _, batch, _ in batches for event in batch if "token_ids" in event]
    salts = {event["medium"]: event.get("cache_salt") for event in events[:-1]}
    assert salts == dict.fromkeys(("GPU", "CPU_PINNED", "EXTERNAL"), "tenant")
    reader.close()
