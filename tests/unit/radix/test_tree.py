"""Rules of the tree, each in the smallest world that shows it."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from hicache_core.errors import ConfigError, IntegrityError, InvalidTokens, SpecError
from hicache_core.kv.keys import chain_seed, pack_tokens
from hicache_core.radix import Match, Node, RadixTree, eviction_policy
from hicache_core.radix.node import Received, run_of
from hicache_core.types import Namespace
from tests.unit.radix.model import all_nodes, ids

PAGE = 4


def make(policy: str = "lru", page_size: int = PAGE) -> RadixTree:
    return RadixTree(page_size, eviction_policy(policy), eviction_policy(policy))


def prompt(*items: int) -> bytes:
    """A page for each item."""
    return pack_tokens([item for item in items for _ in range(PAGE)])


def host_only(tree: RadixTree, tokens: bytes, start: int = 100) -> Node:
    """Put ``tokens`` below what the tree has of them, on the host alone."""
    match = tree.match(tokens)
    rest = tokens[match.n_tokens * 4 :]
    n_pages = len(rest) // (4 * PAGE)
    node = tree.insert_host(match.node, rest, ids(start, n_pages))
    assert node is not None
    assert not tree.settle_host(node, n_pages, n_pages)
    return node


def pages(match: Match) -> tuple[list[int], list[int]]:
    return match.device_pages.tolist(), match.host_pages.tolist()


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_whole_pages_only(page_size: int) -> None:
    """A match ends on a page boundary, whatever the page size."""
    tree = make(page_size=page_size)
    tokens = pack_tokens(range(10 * page_size))
    tree.insert(tokens, ids(0, 10))
    changed = bytearray(tokens)
    changed[4 * (7 * page_size)] ^= 1
    assert tree.match(bytes(changed)).device_pages == ids(0, 7)
    assert tree.match(tokens + tokens).n_tokens == 10 * page_size
    tree.check_integrity()


@pytest.mark.parametrize("tokens", [b"", pack_tokens([1]), pack_tokens([1, 2, 3])])
def test_less_than_a_page_is_never_cached(tokens: bytes) -> None:
    tree = make()
    assert pages(tree.match(tokens)) == ([], [])
    result = tree.insert(tokens, array("i"))
    tree.lock(result.node)
    tree.unlock(result.node)
    assert tree.n_nodes == 0
    tree.check_integrity()


def test_bad_input_is_named_and_changes_nothing() -> None:
    tree = make()
    with pytest.raises(SpecError, match="page_size is 0"):
        make(page_size=0)
    with pytest.raises(ConfigError, match="no eviction policy 'mru'; allowed: lru, lfu"):
        eviction_policy("mru")
    with pytest.raises(InvalidTokens, match="7 bytes"):
        tree.match(b"1234567")
    with pytest.raises(InvalidTokens, match="7 bytes"):
        tree.insert(b"1234567", array("i"))
    for n_pages in (0, 1, 3):
        with pytest.raises(IntegrityError, match=f"{n_pages} device pages for 2 whole pages"):
            tree.insert(prompt(1, 2), ids(0, n_pages))
    assert tree.n_nodes == 0
    tree.check_integrity()


def test_a_match_inside_a_node_splits_it() -> None:
    """The handle ends with the match, so a lock protects just what was matched."""
    tree = make()
    tree.insert(prompt(1, 2, 3), ids(0, 3))
    match = tree.match(prompt(1, 2, 9))
    assert (match.node.n_pages, tree.n_nodes) == (2, 2)
    tree.lock(match.node)
    victim = tree.device_victim(10)
    assert victim is not None
    assert tree.drop_device(victim).device_pages == ids(2, 1)
    assert tree.device_victim(10) is None
    tree.check_integrity()


def test_a_peek_changes_nothing() -> None:
    tree = make()
    tree.insert(prompt(1, 2, 3), ids(0, 3))
    tree.insert(prompt(5), ids(3, 1))
    match = tree.match(prompt(1, 2, 9), touch=False)
    assert pages(match) == ([0, 1], [])
    assert (match.node.n_pages, tree.n_nodes) == (0, 2)
    victim = tree.device_victim(1)
    assert victim is not None
    assert victim.device_pages == ids(2, 1)
    assert victim.hit_count == 0


def test_known_pages_stay_and_duplicates_come_back() -> None:
    tree = make()
    tree.insert(prompt(1, 2), array("i", [10, 11]))
    result = tree.insert(prompt(1, 2, 3), array("i", [10, 21, 22]))
    assert result.pages.tolist() == [10, 11, 22]
    assert result.duplicates.tolist() == [21]
    assert result.n_known_pages == 2
    assert [node.n_pages for node in result.new_nodes] == [1]
    tree.check_integrity()


def test_insert_copies_what_it_is_given() -> None:
    """The caller may reuse its array, and a returned array is not the tree's."""
    tree = make()
    mine = ids(0, 2)
    result = tree.insert(prompt(1, 2), mine)
    mine[0] = result.pages[0] = 77
    tree.match(prompt(1, 2)).device_pages[1] = 77
    assert tree.match(prompt(1, 2)).device_pages == ids(0, 2)


def test_equal_tokens_of_two_namespaces_never_meet() -> None:
    tree = make()
    seeds = [
        chain_seed(space)
        for space in (Namespace(), Namespace(cache_salt="a"), Namespace(lora_id="a"))
    ]
    for i, seed in enumerate(seeds):
        assert not tree.match(prompt(1), seed).device_pages
        tree.insert(prompt(1), ids(i, 1), seed)
    assert [tree.match(prompt(1), seed).device_pages[0] for seed in seeds] == [0, 1, 2]
    digests = {tree.digests(tree.match(prompt(1), seed).node) for seed in seeds}
    assert len(digests) == 3
    tree.check_integrity()


def test_namespaces_that_hold_nothing_cost_nothing() -> None:
    """A stream of one-time salts leaves no empty roots behind."""
    tree = make()
    for i in range(10):
        seed = i.to_bytes(32, "little")
        tree.match(prompt(1), seed)
        tree.insert(prompt(1), ids(i, 1), seed)
    while (victim := tree.device_victim(1)) is not None:
        tree.drop_device(victim)
    assert not tree.roots


def test_a_match_on_an_empty_namespace_can_be_prefetched_below() -> None:
    """Two requests hold the same missing root; both end up in one tree."""
    tree = make()
    first, second = tree.match(prompt(1)).node, tree.match(prompt(2)).node
    for root, item in ((first, 1), (second, 2)):
        node = tree.insert_host(root, prompt(item), ids(item, 1))
        assert node is not None
        tree.settle_host(node, 1, 1)
    assert pages(tree.match(prompt(1))) == ([], [1])
    assert pages(tree.match(prompt(2))) == ([], [2])
    tree.check_integrity()


def test_pending_pages_are_no_hit_until_settled() -> None:
    tree = make()
    node = tree.insert_host(tree.match(prompt(1, 2)).node, prompt(1, 2), ids(0, 2))
    assert node is not None
    assert pages(tree.match(prompt(1, 2))) == ([], [])
    assert tree.host_victim(9) is None
    assert tree.insert_host(tree.match(prompt(1)).node, prompt(1), ids(7, 1)) is None
    assert tree.settle_host(node, 2, 1) == ids(1, 1)
    assert pages(tree.match(prompt(1, 2))) == ([], [0])
    tree.check_integrity()


def test_parts_of_a_prefetch_are_hits_as_they_arrive() -> None:
    tree = make()
    tokens = prompt(1, 2, 3)
    node = tree.insert_host(tree.match(tokens).node, tokens, ids(0, 3))
    assert node is not None
    assert [part.n_pages for part in tree.commit_host(node, 3, 2)] == [2]
    assert pages(tree.match(tokens)) == ([], [0, 1])
    assert tree.host_victim(9) is None
    tree.check_integrity()
    assert tree.commit_host(node, 1, 1) == [node]
    assert not tree.settle_host(node, 0, 0)
    assert pages(tree.match(tokens)) == ([], [0, 1, 2])
    assert tree.host_victim(9) is node
    tree.check_integrity()


def test_a_computed_prefix_meets_its_own_prefetch() -> None:
    """Pages that arrive late still count for the host; those that fail cost nothing."""
    tree = make()
    node = tree.insert_host(tree.match(prompt(1)).node, prompt(1, 2, 3), ids(0, 3))
    assert node is not None
    result = tree.insert(prompt(1, 2), ids(50, 2))
    assert not result.duplicates
    assert pages(tree.match(prompt(1, 2, 3))) == ([50, 51], [])
    assert tree.settle_host(node, 3, 1).tolist() == [1, 2]
    assert pages(tree.match(prompt(1, 2, 3))) == ([50, 51], [])
    assert tree.n_host_pages == 1
    tree.check_integrity()


def test_a_backup_may_be_split_while_it_runs() -> None:
    tree = make()
    node = tree.insert(prompt(1, 2, 3), ids(0, 3)).node
    tree.attach_host(node, ids(10, 3))
    tree.match(prompt(1, 2))
    tree.match(prompt(1))
    assert tree.settle_host(node, 3, 3) == array("i")
    while (victim := tree.device_victim(9)) is not None:
        assert not tree.drop_device(victim).host_pages
    assert pages(tree.match(prompt(1, 2, 3))) == ([], [10, 11, 12])
    tree.check_integrity()


def test_load_back_counts_at_once_and_fails_whole() -> None:
    """Pages on their way up are a device hit; if the copy fails they are host pages again."""
    tree = make()
    node = host_only(tree, prompt(1, 2))
    tree.attach_device(node, 2, ids(0, 2))
    assert pages(tree.match(prompt(1, 2))) == ([0, 1], [])
    assert tree.device_victim(9) is None
    assert tree.host_victim(9) is None
    assert tree.settle_device(node, 2, ok=False) == ids(0, 2)
    assert pages(tree.match(prompt(1, 2))) == ([], [100, 101])
    tree.check_integrity()


def test_a_failed_load_takes_the_loads_below_with_it() -> None:
    tree = make()
    upper = host_only(tree, prompt(1))
    lower = host_only(tree, prompt(1, 2), 200)
    tree.attach_device(upper, 1, ids(0, 1))
    tree.attach_device(lower, 1, ids(5, 1))
    assert tree.settle_device(upper, 1, ok=False) == ids(0, 1)
    assert pages(tree.match(prompt(1, 2))) == ([], [100])
    assert tree.n_device_pages == 1
    tree.check_integrity()
    assert tree.settle_device(lower, 1, ok=True) == ids(5, 1)
    assert pages(tree.match(prompt(1, 2))) == ([], [100, 200])
    tree.check_integrity()


def test_what_was_computed_on_a_failed_load_is_a_bug() -> None:
    tree = make()
    node = host_only(tree, prompt(1))
    tree.attach_device(node, 1, ids(0, 1))
    tree.insert(prompt(1, 2), array("i", [0, 5]))
    with pytest.raises(IntegrityError, match="inserted below a run whose load then failed"):
        tree.settle_device(node, 1, ok=False)
    assert not tree.settle_device(node, 1, ok=True)
    tree.check_integrity()


def test_a_node_with_a_host_copy_outlives_its_device_pages() -> None:
    tree = make()
    node = tree.insert(prompt(1, 2), ids(0, 2)).node
    tree.attach_host(node, ids(10, 2))
    tree.settle_host(node, 2, 2)
    dropped = tree.drop_device(node)
    assert (dropped.device_pages, dropped.host_pages) == (ids(0, 2), array("i"))
    assert pages(tree.match(prompt(1, 2))) == ([], [10, 11])
    assert tree.drop_host(node).host_pages == ids(10, 2)
    assert tree.n_nodes == 0
    tree.check_integrity()


def test_a_node_that_leaves_takes_host_only_nodes_below_along() -> None:
    tree = make()
    upper = tree.insert(prompt(1), ids(0, 1)).node
    host_only(tree, prompt(1, 2))
    dropped = tree.drop_device(upper)
    assert (dropped.device_pages, dropped.host_pages) == (ids(0, 1), ids(100, 1))
    assert tree.n_nodes == 0
    tree.check_integrity()


def test_a_storage_write_keeps_its_host_pages_and_the_way_to_them() -> None:
    """Not even the cascade of a node above frees pages that are being written."""
    tree = make()
    upper = tree.insert(prompt(1), ids(0, 1)).node
    lower = host_only(tree, prompt(1, 2))
    tree.lock_host(lower, 1)
    assert tree.host_victim(1) is None
    assert tree.device_victim(1) is None
    with pytest.raises(IntegrityError, match="in use"):
        tree.drop_device(upper)
    tree.unlock_host(lower, 1)
    assert tree.device_victim(1) is upper
    tree.check_integrity()


def test_a_locked_node_keeps_its_best_copy_only() -> None:
    tree = make()
    node = tree.insert(prompt(1), ids(0, 1)).node
    tree.attach_host(node, ids(10, 1))
    tree.settle_host(node, 1, 1)
    tree.lock(node)
    assert tree.n_evictable_device_pages == 0
    assert tree.device_victim(1) is None
    assert tree.host_victim(1) is node
    tree.drop_host(node)
    tree.unlock(node)
    assert tree.n_evictable_device_pages == 1
    assert tree.device_victim(1) is node
    tree.check_integrity()


def test_locks_are_counted_and_outlive_splits() -> None:
    tree = make()
    node = tree.insert(prompt(1, 2, 3, 4), ids(0, 4)).node
    tree.lock(node)
    tree.lock(node)
    tree.match(prompt(1, 2))
    tree.unlock(node)
    assert tree.device_victim(9) is None
    tree.unlock(node)
    assert tree.device_victim(9) is node
    with pytest.raises(IntegrityError, match="not locked"):
        tree.unlock(node)
    tree.check_integrity()


def test_calls_that_break_the_contract_are_refused() -> None:
    """Each names the node, and the tree is as it was."""
    tree = make()
    gone = tree.insert(prompt(8), ids(90, 1)).node
    tree.drop_device(gone)
    node = tree.insert(prompt(1, 2), ids(0, 2)).node
    host = host_only(tree, prompt(5))
    pending = tree.insert_host(tree.match(prompt(6)).node, prompt(6), ids(60, 1))
    assert pending is not None
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: tree.lock(gone), "has left the tree"),
        (lambda: tree.drop_device(gone), "has left the tree"),
        (lambda: tree.drop_device(host), "in use"),
        (lambda: tree.drop_host(node), "in use"),
        (lambda: tree.attach_host(node, ids(10, 1)), "1 host pages"),
        (lambda: tree.attach_host(host, ids(10, 1)), "no device pages"),
        (lambda: tree.settle_host(node, 2, 2), "not pending"),
        (lambda: tree.settle_host(pending, 1, 2), "2 pages arrived of a run of 1"),
        (lambda: tree.insert_host(pending, prompt(7), ids(10, 1)), "have not arrived"),
        (lambda: tree.insert_host(node, prompt(7), ids(10, 2)), "2 host pages"),
        (lambda: tree.attach_device(node, 2, ids(10, 2)), "not on the host alone"),
        (lambda: tree.attach_device(host, 1, ids(10, 2)), "2 device pages for a run of 1"),
        (lambda: tree.settle_device(node, 2, ok=True), "not loading"),
        (lambda: tree.lock_host(node, 2), "no host pages"),
        (lambda: tree.unlock_host(host, 1), "not locked"),
        (lambda: run_of(node, 1), "no run of 1 pages"),
        (lambda: run_of(node, 3), "no run of 3 pages"),
        (lambda: tree.split(node, 2), "behind 2 pages"),
        (lambda: tree.split(gone, 1), "has left the tree"),
        (lambda: tree.commit_host(node, 2, 1), "not pending"),
        (lambda: tree.commit_host(pending, 1, 2), "2 pages arrived of a run of 1"),
        (lambda: tree.device_victim(0), "at most 0 pages"),
        (tree.reset, "in use"),
    ]
    for call, message in refused:
        with pytest.raises(IntegrityError, match=message):
            call()
        tree.check_integrity()
    assert (tree.n_device_pages, tree.n_host_pages) == (2, 2)


def test_reset_gives_everything_back() -> None:
    tree = make()
    tree.insert(prompt(1, 2), ids(0, 2))
    host_only(tree, prompt(1, 2, 3))
    node = tree.match(prompt(1)).node
    dropped = tree.reset()
    assert sorted(dropped.device_pages) == [0, 1]
    assert dropped.host_pages == ids(100, 1)
    assert (tree.n_nodes, tree.n_device_pages, tree.n_host_pages) == (0, 0, 0)
    with pytest.raises(IntegrityError, match="has left the tree"):
        tree.lock(node)
    tree.check_integrity()


def test_stored_marks_survive_splits() -> None:
    tree = make()
    node = tree.insert(prompt(1, 2), ids(0, 2)).node
    node.stored_in, node.received = 3, Received.CHECKING
    upper = tree.match(prompt(1)).node
    assert (upper.stored_in, node.stored_in) == (3, 3)
    assert upper.received is node.received is Received.CHECKING
    assert not tree.insert(prompt(1, 2, 3), ids(0, 3)).node.stored_in


def test_no_long_buffer_is_kept_alive_for_a_short_node() -> None:
    """Eviction page by page frees the tokens too, not only the page ids."""
    tree = make(page_size=64)
    tree.insert(bytes(4 * 64 * 1000), ids(0, 1000))
    full = tree.memory_nbytes()
    while tree.n_device_pages > 10:
        victim = tree.device_victim(3)
        assert victim is not None
        tree.drop_device(victim)
    held = [getattr(node.tokens, "obj", node.tokens) for node in all_nodes(tree)]
    assert sum(map(len, held)) <= 2 * 4 * 64 * 10
    assert tree.memory_nbytes() < full / 10
