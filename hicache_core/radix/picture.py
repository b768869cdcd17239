"""The picture of a tree: counts of its largest and most used nodes, of bounded size."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from hicache_core.radix.node import Node, path_to_root
from hicache_core.radix.tree import RadixTree

MAX_VISITED = 20_000
MAX_SHOWN = 300


@dataclass(frozen=True, slots=True)
class PictureNode:
    """The counts of one node; no tokens.

    Attributes:
        parent: index of the parent in ``TreePicture.nodes``; -1 for a namespace's root.
        depth_tokens: tokens of the prefix before it.
        tokens: tokens in it; 0 for a root.
        tokens_below: tokens of all nodes below it, shown or not.
        hits: matches that went through it.
        hidden: nodes below it that are not shown, down to the next shown ones.
        tiers: where its pages are: ``device``, ``host``, ``storage`` (storage has them, or is being
            given them).
        locked: a request or a copy keeps it.
        units: the tiers that have its units, by group of layers; without the groups it has none of.
    """

    parent: int
    depth_tokens: int
    tokens: int
    tokens_below: int
    hits: int
    hidden: int
    tiers: tuple[str, ...]
    locked: bool
    units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TreePicture:
    """The largest and the most used nodes of a tree.

    Attributes:
        nodes: parents before children. Each root is a namespace, in the order of their first use.
        n_nodes: nodes of the tree, without roots.
        is_partial: whether the tree has more nodes than were visited, so sums are lower bounds.
    """

    nodes: tuple[PictureNode, ...]
    n_nodes: int
    is_partial: bool


def take_picture(
    tree: RadixTree, *, max_shown: int = MAX_SHOWN, max_visited: int = MAX_VISITED
) -> TreePicture:
    """Takes the picture of a tree. Owner thread.

    Half of ``max_shown`` are the nodes with the most tokens in and below them, half are those with
    the most hits. All nodes above are shown with them, so there may be some more.

    Args:
        tree: the tree.
        max_shown: nodes to show, about.
        max_visited: most nodes to look at, which bounds the time.
    """
    visited = _visit(tree.roots, max_visited)
    shown = _choose(visited, max_shown)
    below: Counter[Node] = Counter()
    hidden: Counter[Node] = Counter()
    for node in reversed(visited):
        if node.parent is not None:
            below[node.parent] += node.n_pages + below[node]
            hidden[node.parent] += 0 if node in shown else 1 + hidden[node]
    at: dict[Node, int] = {}
    nodes: list[PictureNode] = []
    for node in visited:
        if node not in shown:
            continue
        at[node] = len(nodes)
        nodes.append(
            PictureNode(
                parent=-1 if node.parent is None else at[node.parent],
                depth_tokens=node.depth_pages * tree.page_size,
                tokens=node.n_pages * tree.page_size,
                tokens_below=below[node] * tree.page_size,
                hits=node.hit_count,
                hidden=hidden[node],
                tiers=_tiers(node),
                locked=bool(node.lock_count or node.host_lock_count),
                units=_units(tree, node),
            )
        )
    n_roots = sum(node.parent is None for node in visited)
    return TreePicture(tuple(nodes), tree.n_nodes, len(visited) - n_roots < tree.n_nodes)


def _visit(roots: Iterable[Node], max_visited: int) -> list[Node]:
    """Roots and nodes, level by level, at most ``max_visited``."""
    visited = list(islice(roots, max_visited))
    for node in visited:  # the list grows in the loop
        visited.extend(islice(node.children.values(), max_visited - len(visited)))
    return visited


def _choose(visited: list[Node], max_shown: int) -> set[Node]:
    """The nodes to show, each with all above it."""
    weight: Counter[Node] = Counter()
    for node in reversed(visited):
        weight[node] += node.n_pages
        if node.parent is not None:
            weight[node.parent] += weight[node]
    largest = heapq.nlargest(max_shown // 2, visited, key=lambda node: weight[node])
    used = heapq.nlargest(max_shown - len(largest), visited, key=lambda node: node.hit_count)
    shown: set[Node] = set()
    for node in (*largest, *used):
        above = [node, *path_to_root(node)]
        top = above[-1].parent or above[-1]
        if len(shown) < max_shown:
            shown.update(above, (top,))
    return shown


def _tiers(node: Node) -> tuple[str, ...]:
    there = (
        ("device", node.on_device),
        ("host", node.on_host),
        ("storage", node.stored_in != 0),
    )
    return tuple(tier for tier, is_there in there if is_there)


def _units(tree: RadixTree, node: Node) -> dict[str, tuple[str, ...]]:
    held = {one.group.name: one.get(node) for one in tree.groups}
    return {
        name: tuple(
            tier
            for tier, units in (("device", one.device), ("host", one.host))
            if units is not None
        )
        for name, one in held.items()
        if one is not None
    }
