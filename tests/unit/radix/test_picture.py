"""The picture of a tree: bounded, whole upwards, sums that add up, no token in it."""

from __future__ import annotations

from array import array
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from hicache_core.kv.keys import pack_tokens
from hicache_core.radix.eviction import LRU
from hicache_core.radix.node import Received, descendants
from hicache_core.radix.picture import TreePicture, take_picture
from hicache_core.radix.tree import RadixTree

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=16), max_size=20)


def tree_of(prompts: list[list[int]], seed: bytes = b"", page_size: int = 2) -> RadixTree:
    tree = RadixTree(page_size=page_size, device_policy=LRU(), host_policy=LRU())
    add(tree, prompts, seed)
    return tree


def add(tree: RadixTree, prompts: list[list[int]], seed: bytes = b"") -> None:
    for n, tokens in enumerate(prompts):
        n_pages = len(tokens) // tree.page_size
        pages = array("i", range(1000 * n, 1000 * n + n_pages))
        tree.insert(pack_tokens(tokens), pages, seed)
        tree.match(pack_tokens(tokens), seed)


def check(picture: TreePicture) -> None:
    for index, node in enumerate(picture.nodes):
        assert -1 <= node.parent < index, "parents before children"
        shown = [child for child in picture.nodes if child.parent == index]
        if node.parent >= 0:
            parent = picture.nodes[node.parent]
            assert node.depth_tokens >= parent.depth_tokens + parent.tokens
        assert sum(child.tokens + child.tokens_below for child in shown) <= node.tokens_below


def test_an_empty_tree_is_an_empty_picture() -> None:
    assert take_picture(tree_of([])) == TreePicture((), 0, False)


def test_tokens_hits_and_tiers_are_those_of_the_nodes() -> None:
    picture = take_picture(tree_of([[1, 1, 2, 2], [1, 1, 3, 3, 4, 4]]))
    root, *nodes = picture.nodes
    assert (root.parent, root.tokens, root.tokens_below) == (-1, 0, 8)
    assert [(n.depth_tokens, n.tokens, n.tokens_below, n.hits) for n in nodes] == [
        (0, 2, 6, 2),
        (2, 2, 0, 1),
        (2, 4, 0, 1),
    ]
    assert {n.tiers for n in nodes} == {("device",)}


def test_pages_of_another_server_are_not_in_storage_until_storage_has_said_so() -> None:
    tree = tree_of([[1, 1]])
    (node,) = tree.nodes()
    for received in Received:
        node.received = received
        assert take_picture(tree).nodes[1].tiers == ("device",)
    node.stored_in = 1
    assert take_picture(tree).nodes[1].tiers == ("device", "storage")


def test_each_namespace_has_a_root_and_none_shows_its_seed() -> None:
    tree = tree_of([[1, 1]])
    add(tree, [[7, 7]], b"secret-of-a-tenant")
    picture = take_picture(tree)
    assert [node.parent for node in picture.nodes].count(-1) == 2
    assert "secret" not in str(asdict(picture))


@given(PROMPTS)
def test_a_whole_picture_has_every_node_and_hides_none(prompts: list[list[int]]) -> None:
    tree = tree_of(prompts)
    picture = take_picture(tree)
    check(picture)
    assert sum(node.parent >= 0 for node in picture.nodes) == tree.n_nodes == picture.n_nodes
    assert all(node.hidden == 0 for node in picture.nodes)
    assert sum(node.tokens for node in picture.nodes) == 2 * tree.n_device_pages
    assert not picture.is_partial


@given(PROMPTS, st.integers(2, 8))
def test_what_is_hidden_is_counted(prompts: list[list[int]], max_shown: int) -> None:
    tree = tree_of(prompts)
    picture = take_picture(tree, max_shown=max_shown)
    check(picture)
    shown = sum(node.parent >= 0 for node in picture.nodes)
    assert shown + sum(node.hidden for node in picture.nodes) == tree.n_nodes
    depth = max((n.depth_pages for r in tree.roots for n in descendants(r)), default=0)
    assert len(picture.nodes) <= max_shown + depth + 1


@given(PROMPTS, st.integers(1, 10))
def test_no_more_nodes_are_visited_than_allowed(prompts: list[list[int]], limit: int) -> None:
    tree = tree_of(prompts)
    picture = take_picture(tree, max_visited=limit)
    check(picture)
    assert len(picture.nodes) <= limit
    assert picture.is_partial == (tree.n_nodes + (tree.n_nodes > 0) > limit)
