"""S3-FIFO and ARC: what their papers say, where the tree is a table of pages; and their bounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.kv.keys import pack_tokens
from hicache_core.radix import POLICY_NAMES, Node, RadixTree, eviction_policy
from hicache_core.radix.queues import NEW, PROVEN, QueueOrder
from tests.unit.radix.model import all_nodes, ids
from tests.unit.radix.papers import PaperARC, PaperS3FIFO
from tests.unit.radix.server import TreeServer, prompt

PAPERS: dict[str, type[PaperS3FIFO | PaperARC]] = {"s3fifo": PaperS3FIFO, "arc": PaperARC}
QUEUED = sorted(PAPERS)


def assert_same_caches(policy: str, capacity: int, items: list[int], page_size: int = 1) -> int:
    """Serve prompts of one page on both; hits and content are equal after each."""
    model, server = PAPERS[policy](capacity), TreeServer(policy, capacity, page_size)
    n_hits = 0
    for item in items:
        hit = server.request(prompt(page_size, [item]))
        assert bool(hit) == model.request(item)
        held = {int.from_bytes(node.tokens[:4], "little") for node in all_nodes(server.tree)}
        assert held == model.cached
        server.tree.check_integrity()
        n_hits += hit
    return n_hits


@pytest.mark.parametrize("policy", QUEUED)
@given(items=st.lists(st.integers(0, 14), max_size=150), capacity=st.integers(1, 11))
@settings(max_examples=150, deadline=None)
def test_pages_without_prefix_are_served_as_in_the_paper(
    policy: str, items: list[int], capacity: int
) -> None:
    """Any requests, on a cache that holds a part of what is asked for."""
    assert_same_caches(policy, capacity, items)


@pytest.mark.parametrize("policy", QUEUED)
@pytest.mark.parametrize("capacity", [10, 37, 100])
def test_long_runs_are_served_as_in_the_paper(policy: str, capacity: int) -> None:
    """Popular objects between scans, long enough for ghosts to be found, forgotten and found."""
    rng = random.Random(capacity)
    items = [
        min(int(rng.paretovariate(0.6)), 400) if rng.random() < 0.7 else 1000 + i
        for i in range(1500)
    ]
    assert 0 < assert_same_caches(policy, capacity, items, page_size=4) < len(items)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=40),
    capacity=st.integers(8, 20),
)
@settings(max_examples=40, deadline=None)
def test_a_served_prompt_is_there_right_after(
    policy: str, prompts: list[list[int]], capacity: int
) -> None:
    """Prefixes that part anywhere: the invariants hold, and nothing inserted is lost at once."""
    server = TreeServer(policy, capacity, 4)
    for items in prompts:
        tokens = prompt(4, items)
        assert server.request(tokens) <= len(items)
        server.tree.check_integrity()
        assert len(server.tree.match(tokens, touch=False).device_pages) == len(items)
        assert server.tree.n_device_pages + len(server.free) == capacity


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_victims_are_found_without_a_scan(policy: str) -> None:
    """Deep conversations and wide fans: each node is looked at a few times until all are gone."""
    tree = RadixTree(1, eviction_policy(policy), eviction_policy(policy))
    n_pages = 0
    for talk in range(20):
        tokens = [1, 2]
        for turn in range(40):
            tokens = [*tokens, 100 + talk, 200 + turn]
            packed = pack_tokens(tokens)
            known = tree.match(packed).device_pages
            tree.insert(packed, known + ids(n_pages, len(tokens) - len(known)))
            n_pages += len(tokens) - len(known)
    looks = 0

    def may_leave(node: Node) -> bool:
        nonlocal looks
        looks += 1
        return node.may_drop_device()

    n_nodes = tree.n_nodes
    while (victim := tree._residency.device_order.victim(may_leave)) is not None:
        tree.drop_device(victim)
    assert tree.n_nodes == 0
    assert n_nodes > 800
    assert looks <= 6 * n_nodes


def queue_of(tree: RadixTree, *tokens: int) -> int:
    """The queue of the page that these tokens end with."""
    order = tree._residency.device_order
    assert isinstance(order, QueueOrder)
    match = tree.match(pack_tokens(tokens), touch=False)
    assert match.n_tokens == len(tokens)
    return order._entries[match.node].queue


OLD = [1000, 1001, 1002]


def without_old(policy: str) -> TreeServer:
    """A cache that the prompt ``OLD`` has left; its three pages are ghosts."""
    server = TreeServer(policy, 40, 1)
    server.request(prompt(1, OLD))
    for i in range(60):
        server.request(prompt(1, [i]))
        server.request(prompt(1, [i]))
    assert server.tree.match(prompt(1, OLD), touch=False).n_tokens == 0
    return server


@pytest.mark.parametrize("policy", QUEUED)
@pytest.mark.parametrize(("n_new", "is_proven"), [(0, True), (3, True), (4, False)])
def test_a_run_that_is_half_ghosts_is_proven(policy: str, n_new: int, is_proven: bool) -> None:
    """The pages of a prompt that return vouch for as many new ones behind them."""
    server = without_old(policy)
    tokens = OLD + [2000 + i for i in range(n_new)]
    server.request(prompt(1, tokens))
    assert (queue_of(server.tree, *tokens) == PROVEN) == is_proven


@pytest.mark.parametrize("policy", QUEUED)
def test_reset_forgets_the_ghosts(policy: str) -> None:
    """A new start: what left before is as new as any page."""
    server = without_old(policy)
    server.free.extend(server.tree.reset().device_pages)
    assert not list(server.tree._residency.device_order)
    server.request(prompt(1, OLD))
    assert queue_of(server.tree, *OLD) == NEW
    server.tree.check_integrity()


def test_s3fifo_keeps_a_shared_prefix_of_prompts_that_pass() -> None:
    """A prefix with used up suffixes is in the main queue as soon as its turn has come."""
    server = TreeServer("s3fifo", 20, 1)
    for i in range(40):
        server.request(prompt(1, [1, 2, 100 + i, 200 + i]))
    assert queue_of(server.tree, 1, 2) == PROVEN
    assert len(server.tree.match(prompt(1, [1, 2, 3]), touch=False).device_pages) == 2


def scan_survivors(policy: str) -> int:
    """Pages that were used three times, and are still there after a scan of three caches."""
    server = TreeServer(policy, 40, 1)
    popular = [prompt(1, [i]) for i in range(10)]
    for _ in range(4):
        for tokens in popular:
            server.request(tokens)
    for i in range(120):
        server.request(prompt(1, [1000 + i]))
    return sum(server.request(tokens) for tokens in popular)


@pytest.mark.parametrize(
    ("policy", "n_left"), [("lru", 0), ("fifo", 0), ("s3fifo", 10), ("arc", 10)]
)
def test_a_scan_does_not_wash_out_what_is_used(policy: str, n_left: int) -> None:
    """What the new policies are for."""
    assert scan_survivors(policy) == n_left


@pytest.mark.parametrize("policy", QUEUED)
def test_memory_of_ghosts_is_bounded_and_counted(policy: str) -> None:
    """However much passes, the order knows two tiers' pages at most."""
    server = TreeServer(policy, 50, 1)
    sizes = []
    for i in range(2000):
        server.request(prompt(1, [i]))
        if i % 500 == 499:
            sizes.append(server.tree._residency.device_order.memory_nbytes())
    assert sizes[0] > 50 * 80
    assert max(sizes) <= 2 * sizes[0]
