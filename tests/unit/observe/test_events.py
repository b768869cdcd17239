"""KV events: the format of the wire, an index that a subscriber rebuilds, what is never lost."""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hicache_core.errors import ConfigError
from hicache_core.kv.keys import chain_seed, pack_tokens, page_digests
from hicache_core.kv.spec import Group, GroupKind, KVSpec
from hicache_core.observe import events as events_module
from hicache_core.observe.event_format import (
    CLEARED,
    payload,
    payload_of_arrays,
    pieces,
    removed,
    stored,
)
from hicache_core.observe.events import EventsConfig, KvEvents, for_rank
from hicache_core.observe.journal import PageRun
from hicache_core.observe.replay import ReplayBuffer
from hicache_core.types import Namespace, Tier
from tests.unit.observe.subscriber import MEDIA, Subscriber

PAGE_SIZE = 4
SPEC = KVSpec.mha(num_layers=1, num_heads=1, head_dim=2, dtype="float16", fingerprint="model")
MARKS = itertools.count(1 << 20)
LOOPBACK = EventsConfig(
    endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", topic="kv"
)


def run(tokens: list[int], *, skip_pages: int = 0, namespace: Namespace | None = None) -> PageRun:
    """The pages of ``tokens`` behind the first ``skip_pages`` ones."""
    packed = pack_tokens(tokens)
    seed = chain_seed(namespace or Namespace())
    digests = page_digests(packed, PAGE_SIZE, seed)
    parent = digests[(skip_pages - 1) * 32 : skip_pages * 32] if skip_pages else seed
    return PageRun(
        parent=parent,
        digests=digests[skip_pages * 32 :],
        tokens=packed[skip_pages * PAGE_SIZE * 4 :],
        seed=seed,
    )


def hashes(one: PageRun) -> list[int]:
    """Block hashes as the documentation states them: 16 hex digits, signed."""
    texts = [one.digests[at : at + 32].hex()[:16] for at in range(0, len(one.digests), 32)]
    return [struct.unpack(">q", bytes.fromhex(text))[0] for text in texts]


def mark(publisher: KvEvents) -> int:
    """Stores a page that nobody else stores, on every tier's behalf; its hash."""
    number = next(MARKS)
    page = run([number] * PAGE_SIZE)
    publisher.stored(Tier.HOST, page)
    return hashes(page)[0]


@pytest.fixture
def publisher() -> Iterator[KvEvents]:
    events = KvEvents(LOOPBACK)
    events.open()
    yield events
    events.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[KvEvents, Subscriber]]:
    """A publisher that counts from 0 and a subscriber that it knows, for many streams."""
    events = KvEvents(LOOPBACK, wall_clock=lambda: 0.0)
    events.open()
    subscriber = Subscriber(events, "kv")
    subscriber.join(events)
    yield events, subscriber
    subscriber.close()
    events.close()


# The wire.


def test_a_batch_is_these_bytes() -> None:
    """[ts, [{type: …}], dp_rank] in msgpack, written out by hand."""
    page = PageRun(
        parent=b"\xff" * 32,
        digests=b"\x00\x00\x00\x00\x00\x00\x01\x00" + b"\x11" * 24,
        tokens=pack_tokens([1, 300]),
        seed=b"",
    )
    events = [stored(Tier.DEVICE, page), removed(Tier.STORAGE, page), {"type": "AllBlocksCleared"}]
    assert payload(1.5, events, 2) == (
        b"\x93"  # array of 3
        b"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00"  # float64 1.5
        b"\x93"  # array of 3 events
        b"\x88"  # map of 8
        b"\xa4type\xabBlockStored"
        b"\xacblock_hashes\x91\xcd\x01\x00"  # [256]
        b"\xb1parent_block_hash\xff"  # -1
        b"\xa9token_ids\x92\x01\xcd\x01\x2c"  # [1, 300]
        b"\xaablock_size\x02"
        b"\xa7lora_id\xc0"
        b"\xa6medium\xa3GPU"
        b"\xa9lora_name\xc0"
        b"\x83"  # map of 3
        b"\xa4type\xacBlockRemoved"
        b"\xacblock_hashes\x91\xcd\x01\x00"
        b"\xa6medium\xa8EXTERNAL"
        b"\x81"  # map of 1
        b"\xa4type\xb0AllBlocksCleared"
        b"\x02"  # dp_rank
    )


def test_the_first_page_of_a_chain_has_no_parent() -> None:
    tokens = list(range(8))
    salted = Namespace(cache_salt="tenant")
    assert stored(Tier.HOST, run(tokens))["parent_block_hash"] is None
    assert stored(Tier.HOST, run(tokens, namespace=salted))["parent_block_hash"] is None
    second = stored(Tier.HOST, run(tokens, skip_pages=1, namespace=salted))
    assert second["parent_block_hash"] == hashes(run(tokens, namespace=salted))[0]


def test_tenants_have_different_hashes_for_equal_tokens() -> None:
    plain, salted = run([1] * 8), run([1] * 8, namespace=Namespace(cache_salt="tenant"))
    assert set(hashes(plain)).isdisjoint(hashes(salted))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=PAGE_SIZE, max_size=40))
def test_tokens_and_hashes_survive_the_wire(tokens: list[int]) -> None:
    n_pages = len(tokens) // PAGE_SIZE
    pages = run(tokens[: n_pages * PAGE_SIZE])
    lent = PageRun(pages.parent, pages.digests, memoryview(pages.tokens), pages.seed)
    _, (event,), _ = msgpack.unpackb(payload(0.0, [stored(Tier.HOST, lent)], 0))
    assert event["token_ids"] == tokens[: n_pages * PAGE_SIZE]
    assert event["block_hashes"] == hashes(pages)
    assert event["block_size"] == PAGE_SIZE
    assert event["medium"] == "CPU_PINNED"


@given(st.integers(0, 3), st.integers(1, 12), st.integers(1, 40))
def test_a_long_run_is_told_in_pieces_that_are_chained(
    skip_pages: int, n_pages: int, max_tokens: int
) -> None:
    whole = run(list(range((skip_pages + n_pages) * PAGE_SIZE)), skip_pages=skip_pages)
    told = [stored(Tier.HOST, piece) for piece in pieces(whole, max_tokens)]
    assert [h for event in told for h in event["block_hashes"]] == hashes(whole)
    tokens = [token for event in told for token in event["token_ids"]]
    assert tokens == stored(Tier.HOST, whole)["token_ids"]
    assert all(len(event["token_ids"]) <= max(max_tokens, PAGE_SIZE) for event in told)
    parents = [event["parent_block_hash"] for event in told]
    lasts = [event["block_hashes"][-1] for event in told]
    assert parents == [stored(Tier.HOST, whole)["parent_block_hash"], *lasts[:-1]]


@pytest.mark.parametrize("lora_id", [None, "adapter"])
def test_a_salted_page_carries_the_salt_under_the_names_that_routers_read(
    lora_id: str | None,
) -> None:
    """SGLang and Dynamo read cache_salt and lora_name; readers of vLLM extra_keys, by block."""
    namespace = Namespace(cache_salt="tenant", lora_id=lora_id)
    first = stored(Tier.HOST, run([1] * 8, namespace=namespace), namespace)
    rest = stored(Tier.HOST, run([1] * 8, skip_pages=1, namespace=namespace), namespace)
    keys = [] if lora_id is None else [lora_id]
    assert first["extra_keys"] == [[*keys, "tenant"], keys or None]
    assert rest.get("extra_keys") == ([keys] if keys else None)
    for event in (first, rest):
        assert (event["cache_salt"], event["lora_name"]) == ("tenant", lora_id)


def test_an_adapter_alone_is_no_salt() -> None:
    namespace = Namespace(lora_id="adapter")
    event = stored(Tier.HOST, run([1] * 8, namespace=namespace), namespace)
    assert "cache_salt" not in event
    assert (event["lora_name"], event["extra_keys"]) == ("adapter", [["adapter"], ["adapter"]])


@pytest.mark.parametrize("known", [True, False])
def test_what_no_router_can_ask_for_is_never_filed_under_the_plain_prompt(known: bool) -> None:
    """An extra_key, or a namespace whose names are forgotten: the seed stands in as the salt."""
    namespace = Namespace(extra_key="key", cache_salt="tenant")
    page = run([1] * 4, namespace=namespace)
    event = stored(Tier.HOST, page, namespace if known else None)
    assert event["cache_salt"] == chain_seed(namespace).hex()
    assert event["extra_keys"] == [[chain_seed(namespace).hex()]]


def test_without_a_namespace_nothing_is_added() -> None:
    assert list(stored(Tier.HOST, run([1] * 4), Namespace())) == list(
        stored(Tier.HOST, run([1] * 4))
    )
    assert "cache_salt" not in stored(Tier.HOST, run([1] * 4))


def test_arrays_hold_the_same_fields_in_the_order_of_the_older_form() -> None:
    namespace = Namespace(cache_salt="tenant")
    page = run([1] * 4, namespace=namespace)
    events = [stored(Tier.DEVICE, page, namespace), removed(Tier.DEVICE, page), CLEARED]
    ts, arrays, rank = msgpack.unpackb(payload_of_arrays(1.5, events, 2))
    assert (ts, rank) == (1.5, 2)
    assert arrays == [
        ["BlockStored", hashes(page), None, [1] * 4, 4, None, "GPU", None, [["tenant"]]],
        ["BlockRemoved", hashes(page), "GPU"],
        ["AllBlocksCleared"],
    ]
    plain = msgpack.unpackb(payload_of_arrays(1.5, [stored(Tier.DEVICE, run([1] * 4))], 0))
    assert plain[1][0][5:] == [None, "GPU", None]


WINDOW = Group("swa", GroupKind.WINDOW, SPEC, window=7)
STATE = Group("mamba", GroupKind.STATE, SPEC)


def test_units_of_a_group_have_the_fields_of_vllm_for_it() -> None:
    """Names and order are those of ``BlockStored`` and ``BlockRemoved`` in vLLM 0.32."""
    page = run([1] * 4)
    window = replace(page, group=WINDOW, group_index=1)
    state = replace(page, group=STATE, group_index=2)
    plain, told = stored(Tier.HOST, page), stored(Tier.HOST, window)
    assert list(told)[len(plain) :] == [
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
    ]
    assert list(told.values())[len(plain) :] == [None, 1, "sliding_window", 7]
    assert list(stored(Tier.HOST, state).values())[len(plain) :] == [None, 2, "mamba", None]
    assert removed(Tier.HOST, state) == removed(Tier.HOST, page) | {"group_idx": 2}


def test_pieces_of_a_long_run_belong_to_its_group() -> None:
    whole = replace(run([1] * 40), group=WINDOW, group_index=3)
    assert {piece.group_index for piece in pieces(whole, 8)} == {3}


def test_the_setting_chooses_arrays() -> None:
    events = KvEvents(replace(LOOPBACK, format="array"))
    events.open()
    subscriber = Subscriber(events)
    subscriber.join(events)
    assert subscriber.receive()[1][1][0] == ["AllBlocksCleared"]
    subscriber.close()
    events.close()


def test_a_publisher_that_is_started_anew_goes_on_above_its_old_numbers_and_clears_first() -> None:
    """A reader that drops lower numbers sees the new one, and forgets what the old one had."""
    lives = []
    for life in range(2):
        events = KvEvents(LOOPBACK, wall_clock=lambda life=life: 1_790_000_000.0 + life)
        events.stored(Tier.DEVICE, run([life] * PAGE_SIZE))  # before it is open, even
        events.open()
        last = mark(events)
        subscriber = Subscriber(events)
        while not any(last in known for known in subscriber.index.values()):
            batches = list(subscriber.replayed(0))
            for seq, batch in batches:
                if seq >= subscriber.next_seq:
                    subscriber.apply(seq, batch)
        subscriber.close()
        events.close()
        lives.append(batches)
    assert lives[0][0][0] == 1_790_000_000_000_000
    assert lives[1][0][0] > lives[0][-1][0]
    assert [batches[0][1][1][0] for batches in lives] == [{"type": "AllBlocksCleared"}] * 2
    assert lives[1][0][0] < 2**53, "numbers that JavaScript can count"


def test_names_of_namespaces_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_NAMESPACES", 2)
    events = KvEvents(LOOPBACK)
    tenants = [Namespace(cache_salt=f"tenant-{n}") for n in range(3)]
    for tenant in tenants:
        events.named(chain_seed(tenant), tenant)
    for tenant in tenants:
        events.stored(Tier.DEVICE, run([1] * 4, namespace=tenant))
    salts = [event["cache_salt"] for change in events._queue for event, _ in change.events()]
    assert salts == [chain_seed(tenants[0]).hex(), "tenant-1", "tenant-2"]
    events.close()


def test_a_message_has_topic_number_and_payload() -> None:
    events = KvEvents(
        EventsConfig("tcp://127.0.0.1:*", topic="kv", dp_rank=0), wall_clock=lambda: 7.5
    )
    events.open()
    subscriber = Subscriber(events, "kv")
    subscriber.join(events)
    seq, (ts, told, rank) = subscriber.receive()
    subscriber.close()
    events.close()
    assert subscriber.topics == {b"kv"}
    assert (ts, rank) == (7.5, 0)
    assert told[0] == {"type": "AllBlocksCleared"}
    assert seq >= 0


# The index.


CHAINS = [[chain] * 32 for chain in range(3)]
TIER = st.sampled_from(list(Tier))
PAGES = st.tuples(st.sampled_from(range(3)), st.integers(0, 7), st.integers(1, 8))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("stored"), TIER, PAGES),
        st.tuples(st.just("removed"), TIER, PAGES),
        st.just(("cleared", Tier.HOST, (0, 0, 1))),
    ),
    max_size=60,
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS, lose=st.sets(st.integers(0, 20)))
def test_a_subscriber_rebuilds_the_exact_index(
    pair: tuple[KvEvents, Subscriber],
    steps: list[tuple[str, Tier, tuple[int, int, int]]],
    lose: set[int],
) -> None:
    """Whatever is stored, removed and cleared, and whichever messages get lost on the way."""
    publisher, subscriber = pair
    medium = {Tier.DEVICE: "GPU", Tier.HOST: "CPU_PINNED", Tier.STORAGE: "EXTERNAL"}
    model: dict[str, set[int]] = {name: set() for name in MEDIA}
    publisher.cleared()
    for what, tier, (chain, first, n_pages) in steps:
        end = min(first + n_pages, 8)
        pages = run(CHAINS[chain][: end * PAGE_SIZE], skip_pages=first)
        if what == "stored":
            publisher.stored(tier, pages)
            model[medium[tier]].update(hashes(pages))
        elif what == "removed":
            publisher.removed(tier, pages, "evicted")
            model[medium[tier]].difference_update(hashes(pages))
        else:
            publisher.cleared()
            model = {name: set() for name in MEDIA}
    end_mark = mark(publisher)
    model["CPU_PINNED"].add(end_mark)
    first_seq = subscriber.next_seq
    last_mark = end_mark
    subscriber_lose = {first_seq + n for n in lose}
    # A lost last message shows only when another one follows.
    if subscriber_lose:
        last_mark = _chatter(publisher, subscriber, end_mark, subscriber_lose, model)
    subscriber.follow_until(last_mark, lose=subscriber_lose)
    assert {name: subscriber.index[name] for name in MEDIA} == model


def _chatter(
    publisher: KvEvents,
    subscriber: Subscriber,
    end_mark: int,
    lose: set[int],
    model: dict[str, set[int]],
) -> int:
    """More messages, each alone in its batch, until none of those that get lost is the last."""
    last = end_mark
    while publisher.status().sent_batches <= max(lose) + 1:
        if not publisher.status().queued_runs:
            last = mark(publisher)
            model["CPU_PINNED"].add(last)
    return last


# Loss.


def test_who_comes_late_gets_everything_by_replay(publisher: KvEvents) -> None:
    pages = run(list(range(64)))
    publisher.stored(Tier.STORAGE, pages)
    publisher.removed(Tier.STORAGE, run(list(range(64)), skip_pages=12), "evicted")
    last = mark(publisher)
    subscriber = Subscriber(publisher, "kv")
    while not any(last in known for known in subscriber.index.values()):
        for seq, batch in subscriber.replayed(subscriber.next_seq):
            subscriber.apply(seq, batch)
    subscriber.close()
    assert subscriber.index["EXTERNAL"] == set(hashes(pages)[:12])


def test_a_replay_longer_than_any_high_water_mark_is_whole() -> None:
    events = KvEvents(LOOPBACK, wall_clock=lambda: 0.0)
    events.open()
    n_batches = 3000
    while events.status().sent_batches < n_batches:
        if events.status().queued_runs == 0:
            events.cleared()
    subscriber = Subscriber(events)
    numbers = [seq for seq, _ in subscriber.replayed(10)]
    subscriber.close()
    events.close()
    assert numbers == list(range(10, 10 + len(numbers)))
    assert len(numbers) >= n_batches - 10


def test_a_full_queue_ends_in_too_little_never_in_too_much() -> None:
    """A thread that cannot keep up drops all it has and tells that it knows nothing."""
    events = KvEvents(EventsConfig("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", queue_runs=4))
    for number in range(4):  # before open: the thread does not run at all
        events.stored(Tier.DEVICE, run([number] * PAGE_SIZE))
    gone, kept = run([100] * PAGE_SIZE), run([101] * PAGE_SIZE)
    events.removed(Tier.DEVICE, gone, "evicted")
    events.stored(Tier.DEVICE, kept)
    assert events.status().dropped_runs == 4
    events.open()
    subscriber = Subscriber(events)
    while not subscriber.index["GPU"]:
        for seq, batch in subscriber.replayed(subscriber.next_seq):
            subscriber.apply(seq, batch)
            assert batch[1][0] == {"type": "AllBlocksCleared"}
    subscriber.close()
    events.close()
    assert subscriber.index["GPU"] == set(hashes(kept))


def test_the_queue_stays_bounded_without_a_thread() -> None:
    events = KvEvents(EventsConfig(queue_runs=10))
    for number in range(1000):
        events.stored(Tier.HOST, run([number] * PAGE_SIZE))
        assert events.status().queued_runs <= 11
    status = events.status()
    assert status.dropped_runs + status.queued_runs >= 1000
    events.close()
    assert events.status().queued_runs == 0


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 10), st.integers(1, 200))
def test_the_replay_buffer_keeps_the_newest_within_its_bounds(
    sizes: list[int], max_batches: int, max_nbytes: int
) -> None:
    buffer = ReplayBuffer(max_batches, max_nbytes)
    everything = []
    for n, size in enumerate(sizes):
        everything.append((n, bytes(size)))
        assert buffer.add(bytes(size)) == n
        kept = list(buffer.since(0))
        assert kept == everything[len(everything) - len(kept) :]
        assert len(kept) <= max_batches
        assert sum(len(batch) for _, batch in kept) <= max_nbytes
        assert list(buffer.since(n)) == kept[-1:]


# Life.


def test_close_sends_what_is_queued_and_tells_no_more(publisher: KvEvents) -> None:
    subscriber = Subscriber(publisher, "kv")
    subscriber.join(publisher)
    for number in range(1000):
        publisher.stored(Tier.DEVICE, run([number] * PAGE_SIZE))
    last = mark(publisher)
    publisher.close()
    publisher.stored(Tier.DEVICE, run([5000] * PAGE_SIZE))
    assert publisher.status().queued_runs == 0
    subscriber.follow_until(last)
    subscriber.close()
    assert len(subscriber.index["GPU"]) == 1000


def test_close_ends_with_a_subscriber_that_does_not_read() -> None:
    before = set(threading.enumerate())
    events = KvEvents(LOOPBACK)
    events.open()
    stuck = Subscriber(events)
    stuck.join(events)
    large_page = PageRun(b"", b"\x01" * 32, bytes(1 << 19), b"")
    for _ in range(200):
        events.stored(Tier.DEVICE, large_page)
    events.close(timeout_s=0.2)
    events.close()
    assert set(threading.enumerate()) == before
    assert events.status().queued_runs == 0
    stuck.close()


def test_nonsense_on_the_replay_socket_hurts_nobody(publisher: KvEvents) -> None:
    context = zmq.Context()
    rude = context.socket(zmq.DEALER)
    rude.connect(publisher.replay_endpoint)
    for frames in ([b"x"], [b"", b"short"], [b"", b"1", b"2", b"3"]):
        rude.send_multipart(frames)
    last = mark(publisher)
    subscriber = Subscriber(publisher, "kv")
    while not subscriber.index["CPU_PINNED"]:
        for seq, batch in subscriber.replayed(subscriber.next_seq):
            subscriber.apply(seq, batch)
    assert subscriber.index["CPU_PINNED"] == {last}
    subscriber.close()
    context.destroy(linger=0)


def test_an_address_that_is_taken_is_a_clear_error(publisher: KvEvents) -> None:
    second = KvEvents(EventsConfig(publisher.endpoint))
    with pytest.raises(ConfigError, match="cannot bind 'tcp://127"):
        second.open()
    second.close()


def test_each_data_parallel_rank_has_its_port() -> None:
    assert for_rank("tcp://*:5557", 0) == "tcp://*:5557"
    assert for_rank("tcp://*:5557", 3) == "tcp://*:5560"
    assert for_rank("tcp://[::1]:5557", 1) == "tcp://[::1]:5558"
    assert for_rank("tcp://127.0.0.1:*", 3) == "tcp://127.0.0.1:*"
    assert for_rank("ipc:///run/kv", 2) == "ipc:///run/kv_dp2"
