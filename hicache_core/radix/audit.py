"""Checks of a whole tree: its invariants, and the memory that it takes."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Mapping

from hicache_core.errors import IntegrityError
from hicache_core.radix.node import Node, descendants
from hicache_core.radix.order import EvictionOrder
from hicache_core.radix.residency import Residency


def _require(holds: bool, node: Node, rule: str) -> None:
    if not holds:
        raise IntegrityError(f"{node}: {rule}")


def check_nodes(roots: Mapping[bytes, Node], page_nbytes: int) -> list[Node]:
    """Check each node against its neighbours.

    Args:
        roots: the tree's roots by seed.
        page_nbytes: bytes of a page's packed tokens.

    Returns:
        All nodes but the roots.

    Raises:
        IntegrityError: names the node and the rule that does not hold.
    """
    nodes: list[Node] = []
    for seed, root in roots.items():
        _require(root.key == seed and root.parent is None, root, "a root is kept under its seed")
        _require(bool(root.children), root, "an empty root is not kept")
        _check_children(root)
        for node in descendants(root):
            _check_shape(page_nbytes, node)
            _check_copies(node)
            _check_children(node)
            nodes.append(node)
    return nodes


def check_residency(residency: Residency, nodes: list[Node]) -> None:
    """Check the counts and the eviction orders of both tiers against ``nodes``, the whole tree.

    Raises:
        IntegrityError: names what does not add up.
    """
    _check_counts(residency, nodes)
    _check_order(residency.device_order, nodes, lambda node: node.on_device)
    _check_order(residency.host_order, nodes, lambda node: node.on_host)


def _check_shape(page_nbytes: int, node: Node) -> None:
    parent = node.parent
    assert parent is not None
    _require(node.n_pages > 0, node, "only a root is empty")
    _require(len(node.tokens) == node.n_pages * page_nbytes, node, "tokens fill the pages")
    _require(bytes(node.tokens[:page_nbytes]) == node.key, node, "the key is the first page")
    _require(parent.children.get(node.key) is node, node, "its parent knows it")
    _require(node.depth_pages == parent.depth_pages + parent.n_pages, node, "depths add up")
    if node.digests is not None:
        _require(len(node.digests) == 32 * node.n_pages, node, "a digest for each page")


def _check_copies(node: Node) -> None:
    parent = node.parent
    assert parent is not None
    for pages in (node.device_pages, node.host_pages):
        _require(pages is None or len(pages) == node.n_pages, node, "a page id for each page")
    _require(node.on_device or node.host_pages is not None, node, "a node has a copy")
    _require(node.on_device or not node.device_pending, node, "pending pages exist")
    _require(node.host_pages is not None or not node.host_pending, node, "pending pages exist")
    _require(not (node.host_pending or node.device_pending) or node.lock_count > 0, node,
             "what is in flight is locked")  # fmt: skip
    _require(not node.device_pending or node.n_host_readers > 0, node, "a load locks its source")
    _require(node.host_lock_count >= node.n_host_readers >= 0, node, "who reads the host locks it")
    _require(not node.n_host_readers or node.host_pages is not None, node, "what is read is there")
    _require(
        not node.on_device or parent.parent is None or parent.on_device,
        node,
        "device residency is closed under prefixes",
    )
    if parent.parent is not None:
        _require(parent.lock_count >= node.lock_count, node, "a parent has its child's locks")
        _require(
            parent.host_lock_count >= node.host_lock_count,
            node,
            "a parent has its child's host locks",
        )
        _require(parent.hit_count >= node.hit_count, node, "a hit counts for the whole path")
        _require(parent.priority >= node.priority, node, "a prefix has the highest priority")


def _check_children(node: Node) -> None:
    children = node.children.values()
    n_device = sum(child.on_device for child in children)
    n_host = sum(child.host_pages is not None for child in children)
    _require(n_device == node.n_device_children, node, "children on the device are counted")
    _require(n_host == node.n_host_children, node, "children with host pages are counted")
    if node.host_pending and not node.on_device:
        same_run = all(child.host_pending and not child.on_device for child in children)
        _require(
            same_run and len(children) <= 1, node, "only the rest of a pending run is below it"
        )


def _check_counts(residency: Residency, nodes: list[Node]) -> None:
    device_pages, host_pages = array("i"), array("i")
    n_locked = 0
    for node in nodes:
        device_pages.extend(node.device_pages or ())
        host_pages.extend(node.host_pages or ())
        n_locked += node.n_pages if node.lock_count and node.on_device else 0
    for pages in residency.doomed.values():
        device_pages.extend(pages)
    for tier, pages, count in (
        ("device", device_pages, residency.n_device_pages),
        ("host", host_pages, residency.n_host_pages),
    ):
        if len(set(pages)) != len(pages):
            raise IntegrityError(f"a {tier} page belongs to two nodes")
        if len(pages) != count:
            raise IntegrityError(f"{len(pages)} {tier} pages, but {count} are counted")
    if n_locked != residency.n_locked_device_pages:
        raise IntegrityError(
            f"{n_locked} locked device pages, but {residency.n_locked_device_pages} are counted"
        )


def _check_order(order: EvictionOrder, nodes: list[Node], has_copy: Callable[[Node], bool]) -> None:
    known = set(nodes)
    listed = set(order)
    for node in listed:
        _require(node in known and has_copy(node), node, "an order lists nodes of its tier only")
    for node in known - listed:
        may_be_out = not has_copy(node) or node.lock_count > 0 or order.may_rest(node)
        _require(may_be_out, node, "the order of its tier does not list it")
    order.check_integrity()


def tree_nbytes(roots: Iterable[Node], residency: Residency) -> int:
    """Bytes of the Python objects that a tree keeps alive, by ``sys.getsizeof``.

    A buffer of tokens counts in full for the one node that views it.
    """
    size = sys.getsizeof
    total = 0
    for root in roots:
        total += size(root) + size(root.children)
        for node in descendants(root):
            total += size(node) + size(node.children) + size(node.key) + size(node.tokens)
            if isinstance(node.tokens, memoryview):
                total += size(node.tokens.obj)
            for pages in (node.device_pages, node.host_pages, node.digests):
                total += 0 if pages is None else size(pages)
    return total + residency.device_order.memory_nbytes() + residency.host_order.memory_nbytes()
