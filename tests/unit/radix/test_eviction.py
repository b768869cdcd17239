"""Who leaves first, under each policy."""

from __future__ import annotations

import pytest

from hicache_core.kv.keys import pack_tokens
from hicache_core.radix import POLICY_NAMES, RadixTree, eviction_policy
from tests.unit.radix.model import ids


class World:
    """A tree of one-page prompts, named by their token."""

    def __init__(self, policy: str) -> None:
        self.tree = RadixTree(1, eviction_policy(policy), eviction_policy(policy))
        self.n_pages = 0

    def insert(self, *tokens: int, priority: int = 0) -> None:
        pages = self.tree.match(pack_tokens(tokens), touch=False).device_pages
        n_new = len(tokens) - len(pages)
        pages.extend(ids(self.n_pages, n_new))
        self.n_pages += n_new
        self.tree.insert(pack_tokens(tokens), pages, priority=priority)

    def use(self, *tokens: int) -> None:
        assert self.tree.match(pack_tokens(tokens)).n_tokens == len(tokens)

    def evict_all(self) -> list[int]:
        """Last token of each page in the order of leaving."""
        gone: list[int] = []
        while (victim := self.tree.device_victim(1)) is not None:
            gone.append(int.from_bytes(victim.tokens, "little"))
            self.tree.drop_device(victim)
            self.tree.check_integrity()
        return gone


def test_lru_drops_what_was_used_longest_ago() -> None:
    world = World("lru")
    for token in (1, 2, 3):
        world.insert(token)
    world.use(1)
    assert world.evict_all() == [2, 3, 1]


def test_fifo_ignores_use() -> None:
    world = World("fifo")
    for token in (1, 2, 3):
        world.insert(token)
    world.use(1)
    world.insert(1)
    assert world.evict_all() == [1, 2, 3]


def test_fifo_counts_a_prefix_with_its_last_suffix() -> None:
    world = World("fifo")
    world.insert(1)
    world.insert(2)
    world.insert(1, 5)
    assert world.evict_all() == [2, 5, 1]


def test_lfu_drops_what_was_matched_least() -> None:
    world = World("lfu")
    for token in (1, 2, 3):
        world.insert(token)
    for token in (1, 1, 3, 2, 2):
        world.use(token)
    assert world.evict_all() == [3, 1, 2]


def test_slru_protects_what_was_matched_twice() -> None:
    world = World("slru")
    for token in (1, 2, 3):
        world.insert(token)
    for token in (1, 1, 2, 3, 2):
        world.use(token)
    assert world.evict_all() == [3, 1, 2]


def test_priority_goes_before_recency() -> None:
    world = World("priority")
    world.insert(1, priority=1)
    world.insert(2, priority=-3)
    world.insert(3)
    world.use(2)
    assert world.evict_all() == [2, 3, 1]


def test_a_prefix_has_the_highest_priority_of_its_suffixes() -> None:
    world = World("priority")
    world.insert(1, 2)
    world.insert(3)
    world.insert(1, 4, priority=5)
    assert world.evict_all() == [2, 3, 4, 1]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_suffixes_leave_before_their_prefix(policy: str) -> None:
    world = World(policy)
    world.insert(1, 2, 3)
    world.insert(1, 2, 4)
    world.use(1)
    gone = world.evict_all()
    assert sorted(gone) == [1, 2, 3, 4]
    assert gone.index(2) > max(gone.index(3), gone.index(4))
    assert gone[-1] == 1


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_leaf_gives_up_its_last_pages_first(policy: str) -> None:
    tree = RadixTree(1, eviction_policy(policy), eviction_policy(policy))
    tree.insert(pack_tokens(range(10)), ids(0, 10))
    for start, max_pages in ((7, 3), (3, 4), (0, 9)):
        victim = tree.device_victim(max_pages)
        assert victim is not None
        dropped = tree.drop_device(victim).device_pages
        assert dropped == ids(start, min(max_pages, 10 - start) if start else 3)
        tree.check_integrity()


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_locked_page_whose_turn_came_can_leave_after_unlock(policy: str) -> None:
    world = World(policy)
    world.insert(1, 2)
    world.insert(3)
    node = world.tree.match(pack_tokens([1, 2]), touch=False).node
    world.tree.lock(node)
    assert world.evict_all() == [3]
    world.tree.unlock(node)
    world.tree.check_integrity()
    assert world.evict_all() == [2, 1]
    assert world.tree.n_nodes == 0


def test_a_lock_alone_is_no_use() -> None:
    """Locking and unlocking, as a backup does, leaves the recency as it was."""
    world = World("lru")
    world.insert(1)
    world.insert(2)
    node = world.tree.match(pack_tokens([1]), touch=False).node
    world.tree.lock(node)
    world.tree.unlock(node)
    assert world.evict_all() == [1, 2]
