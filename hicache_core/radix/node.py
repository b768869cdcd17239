"""A node of the radix tree: a run of whole pages."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterator

from hicache_core.errors import IntegrityError
from hicache_core.kv.keys import DIGEST_NBYTES, page_digests

# Up to this size one comparison of the whole node pays, even if a bisection has to follow.
_ONE_COMPARE_NBYTES = 32768


class Received(enum.Enum):
    """Whether pages came from another server, which may have stored them."""

    NO = "no"  # computed here, or storage has said whether it has them
    UNCHECKED = "unchecked"  # storage is to be asked before they are written
    CHECKING = "checking"  # storage is being asked


_COMPUTED_HERE = Received.NO  # looked up once: Python 3.11 takes 70 ns for a member of an enum


class Node:
    """A run of pages below ``parent``. The tree changes it; others only read.

    A root has no pages and no parent, and its ``key`` is the chain's seed. A node with pages but
    no parent has left the tree.

    Attributes:
        parent: the node that holds the pages before.
        children: by the bytes of their first page.
        key: packed tokens of the first page (the seed, for a root).
        tokens: packed tokens of all its pages; a view if it shares the caller's buffer.
        n_pages: pages in this node.
        depth_pages: pages before this node.
        device_pages: page ids in the device pool; None if the device does not have them.
        device_pending: a load_back into ``device_pages`` has not settled.
        host_pages: page ids in the host pool; None if the host does not have them.
        host_pending: a copy or read into ``host_pages`` has not settled.
        n_device_children: children that have device pages.
        n_host_children: children that have host pages, pending ones too.
        lock_count: locks on this node or below it.
        host_lock_count: host locks on this node or below it.
        n_host_readers: unsettled copies and stores that read ``host_pages``.
        stored_in: number of the storage attachment that has, or is being given, its pages; 0 for
            none.
        received: whether its pages came from another server.
        hit_count: matches of prefixes that end in this node or below.
        priority: the highest that was inserted here or below.
        digests: page digests, 32 bytes each, packed; None until they are computed.
    """

    __slots__ = (
        "children",
        "depth_pages",
        "device_pages",
        "device_pending",
        "digests",
        "hit_count",
        "host_lock_count",
        "host_pages",
        "host_pending",
        "key",
        "lock_count",
        "n_device_children",
        "n_host_children",
        "n_host_readers",
        "n_pages",
        "parent",
        "priority",
        "received",
        "stored_in",
        "tokens",
    )

    def __init__(
        self, parent: Node | None, key: bytes, tokens: bytes | memoryview, n_pages: int
    ) -> None:
        """In no tier yet; the caller puts it among the children of ``parent``.

        Args:
            parent: the node that holds the pages before; None for a root.
            key: packed tokens of the first page (the seed, for a root).
            tokens: packed tokens of all its pages; empty for a root.
            n_pages: number of its pages; 0 for a root.
        """
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.key = key
        self.tokens = tokens
        self.n_pages = n_pages
        self.depth_pages: int = 0 if parent is None else parent.depth_pages + parent.n_pages
        self.device_pages: array[int] | None = None
        self.device_pending = False
        self.host_pages: array[int] | None = None
        self.host_pending = False
        self.n_device_children = 0
        self.n_host_children = 0
        self.lock_count = 0
        self.host_lock_count = 0
        self.n_host_readers = 0
        self.stored_in = 0
        self.received: Received = _COMPUTED_HERE
        self.hit_count = 0
        self.priority = 0
        self.digests: bytes | None = None

    @property
    def on_device(self) -> bool:
        """It has device pages, which may still be arriving."""
        return self.device_pages is not None

    @property
    def on_host(self) -> bool:
        """It has host pages and they hold its KV."""
        return self.host_pages is not None and not self.host_pending

    @property
    def best_pages(self) -> array[int]:
        """Its device pages, or its host pages if the device does not have it."""
        pages = self.host_pages if self.device_pages is None else self.device_pages
        assert pages is not None
        return pages

    @property
    def in_tree(self) -> bool:
        """It is a root or is below one."""
        return self.parent is not None or self.n_pages == 0

    # What may be dropped. The rules follow from the node's own copies, locks and children.

    def may_drop_device(self) -> bool:
        """Nothing below the node is on the device, and no lock keeps its device pages."""
        return (
            self.device_pages is not None
            and self.lock_count == 0
            and self.n_device_children == 0
            and (self.host_lock_count == 0 or self.on_host)
        )

    def may_drop_host(self) -> bool:
        """Nothing below the node has host pages, and no lock keeps its own."""
        return (
            self.on_host
            and self.host_lock_count == 0
            and self.n_host_children == 0
            and (self.lock_count == 0 or self.on_device)
        )

    def may_spare_host(self) -> bool:
        """As ``may_drop_host``, or the device has the pages too and nobody reads the host's.

        Nodes below may have host pages then: they keep their place as long as the node has device
        pages.
        """
        is_spare = self.on_host and self.on_device and self.n_host_readers == 0
        return is_spare or self.may_drop_host()

    def is_idle_on_device_alone(self) -> bool:
        """Only the device has the pages, no lock keeps them, and nothing below is on the device.

        Such a node may leave the device once the host has done its part: taken a copy, or let go
        of pages below the node that are being stored.
        """
        return (
            self.device_pages is not None
            and self.host_pages is None
            and self.lock_count == 0
            and self.n_device_children == 0
        )

    def may_leave_or_back_up(self) -> bool:
        """The node may leave the device now, or once its pages were copied to the host."""
        return self.may_drop_device() or self.is_idle_on_device_alone()

    def __repr__(self) -> str:
        """Position and tiers, for messages."""
        copies = [
            f"device{' pending' if self.device_pending else ''}" if self.on_device else "",
            f"host{' pending' if self.host_pending else ''}" if self.host_pages is not None else "",
        ]
        where = "+".join(filter(None, copies)) or ("root" if self.n_pages == 0 else "nowhere")
        pages = f"pages {self.depth_pages}..{self.depth_pages + self.n_pages}"
        return f"<Node {pages} on {where}, {self.lock_count} locks>"


def require_in_tree(node: Node) -> None:
    """Refuse a node that has left the tree.

    Raises:
        IntegrityError: the node has left the tree.
    """
    if node.parent is None and node.n_pages:
        raise IntegrityError(f"{node} has left the tree; lock a node to keep it")


def path_to_root(node: Node) -> Iterator[Node]:
    """``node`` and its ancestors, deepest first, without the root."""
    at: Node | None = node
    while at is not None and at.parent is not None:
        yield at
        at = at.parent


def run_of(node: Node, n_pages: int) -> list[Node]:
    """The nodes that make up exactly the ``n_pages`` that end at ``node``, top to bottom.

    Raises:
        IntegrityError: the run starts inside a node or before the root.
    """
    require_in_tree(node)
    members: list[Node] = []
    missing = n_pages
    at = node
    while missing > 0 and at.parent is not None:
        members.append(at)
        missing -= at.n_pages
        at = at.parent
    if missing:
        raise IntegrityError(f"no run of {n_pages} pages ends at {node}")
    members.reverse()
    return members


def pending_run(node: Node, n_pages: int, n_arrived: int) -> list[Node]:
    """The nodes of a run whose host pages are all pending.

    Args:
        node: the end of the run.
        n_pages: pages of the run.
        n_arrived: pages of it that have arrived.

    Raises:
        IntegrityError: they are not all pending, or ``n_arrived`` is more than ``n_pages``.
    """
    if not 0 <= n_arrived <= n_pages:
        raise IntegrityError(f"{n_arrived} pages arrived of a run of {n_pages}")
    members = run_of(node, n_pages)
    if not all(member.host_pending for member in members):
        raise IntegrityError(f"some of the {n_pages} host pages up to {node} are not pending")
    return members


def loads_below(members: list[Node]) -> list[Node]:
    """The nodes below a run whose load failed that have device pages; all are still loading.

    Raises:
        IntegrityError: one was inserted, although the load was not known to be good.
    """
    inside = set(members)
    below = [at for at in descendants(members[0]) if at.on_device and at not in inside]
    for at in below:
        if not at.device_pending:
            raise IntegrityError(f"{at} was inserted below a run whose load then failed")
    return below


def path_to(node: Node) -> list[Node]:
    """The nodes from the first page down to ``node``, without the root."""
    return list(path_to_root(node))[::-1]


def raise_priority(node: Node, priority: int) -> None:
    """Gives ``node`` and those above it at least ``priority``."""
    while node.parent is not None:
        node.priority = max(node.priority, priority)
        node = node.parent


def last_on_device(node: Node) -> Node:
    """``node`` or the nearest above it that has device pages; the root if none has."""
    while node.device_pages is None and node.parent is not None:
        node = node.parent
    return node


def descendants(node: Node) -> Iterator[Node]:
    """All nodes below ``node``, parents before children. The tree must not change meanwhile."""
    stack = list(node.children.values())
    while stack:
        at = stack.pop()
        yield at
        stack.extend(at.children.values())


def node_digests(node: Node, page_size: int) -> bytes:
    """Page digests of ``node``, 32 bytes each, packed; computed once and kept in the nodes."""
    missing: list[Node] = []
    root: Node = node
    for at in path_to_root(node):
        if at.digests is not None:
            root = at
            break
        missing.append(at)
        root = at.parent or at
    last = root.key if root.parent is None else (root.digests or b"")[-DIGEST_NBYTES:]
    for at in reversed(missing):
        at.digests = page_digests(bytes(at.tokens), page_size, last)
        last = at.digests[-DIGEST_NBYTES:]
    return node.digests or b""


def adopt_digests(node: Node, n_pages: int, digests: bytes) -> None:
    """Keep the page digests of a run, which were computed elsewhere.

    Args:
        node: the end of the run.
        n_pages: pages of the run.
        digests: 32 bytes for each page, packed.
    """
    start = 0
    for member in run_of(node, n_pages):
        stop = start + member.n_pages * DIGEST_NBYTES
        if member.digests is None:
            member.digests = digests[start:stop]
        start = stop


def keep_tokens(tokens: bytes | memoryview) -> bytes | memoryview:
    """What a node keeps of a buffer: a view if it needs more than half of it, else a copy.

    A view saves the page faults of fresh memory. A node never keeps a buffer alive that is twice as
    long as its own tokens, so no two nodes keep the same buffer.
    """
    if isinstance(tokens, bytes):
        return tokens
    return tokens if 2 * len(tokens) > len(tokens.obj) else bytes(tokens)  # type: ignore[arg-type]


def equal_pages(child: Node, tokens: bytes, start: int, page_nbytes: int) -> int:
    """Number of leading pages that ``child`` and ``tokens[start:]`` share.

    Args:
        child: a node whose first page is known to be equal.
        tokens: packed tokens.
        start: offset into ``tokens``, in bytes.
        page_nbytes: bytes of a page's tokens.

    It bisects::

        child  |  equal  |  equal  |? ? ? ? ? ? |   |
               0         lo        mid          hi

    Each step compares only ``lo..mid``, so all steps together compare each byte once at most.
    """
    if len(child.tokens) <= _ONE_COMPARE_NBYTES and tokens.startswith(child.tokens, start):
        return child.n_pages
    view = memoryview(child.tokens)
    lo, hi = 1, min(child.n_pages, (len(tokens) - start) // page_nbytes)
    while lo < hi:
        mid = (lo + hi + 1) // 2
        piece = view[lo * page_nbytes : mid * page_nbytes]
        if tokens.startswith(piece, start + lo * page_nbytes):
            lo = mid
        else:
            hi = mid - 1
    return lo


def cut(pages: array[int] | None, at: int) -> tuple[array[int] | None, array[int] | None]:
    """Cut page ids in two at index ``at``; the first part is the same array, shortened."""
    if pages is None:
        return None, None
    tail = pages[at:]
    del pages[at:]
    return pages, tail


def split_node(node: Node, at: int, page_nbytes: int) -> Node:
    """Put a new node above ``node`` that takes its first ``at`` pages; returns the new node.

    before:  parent - node[0..n]            after:  parent - upper[0..at] - node[at..n]

    ``node`` stays the lower part, so it still names the same last page to whoever holds it.

    Args:
        node: the node to split.
        at: pages of the new node, more than 0 and fewer than ``node`` has.
        page_nbytes: bytes of a page's tokens.
    """
    parent = node.parent
    assert parent is not None
    assert 0 < at < node.n_pages
    view = memoryview(node.tokens)
    boundary = at * page_nbytes
    upper = Node(parent, node.key, keep_tokens(view[:boundary]), at)
    parent.children[node.key] = upper
    node.key = bytes(view[boundary : boundary + page_nbytes])
    node.tokens = keep_tokens(view[boundary:])
    node.parent = upper
    node.n_pages -= at
    node.depth_pages += at
    upper.children[node.key] = node
    upper.device_pages, node.device_pages = cut(node.device_pages, at)
    upper.host_pages, node.host_pages = cut(node.host_pages, at)
    upper.device_pending, upper.host_pending = node.device_pending, node.host_pending
    upper.n_device_children = int(node.device_pages is not None)
    upper.n_host_children = int(node.host_pages is not None)
    upper.lock_count, upper.host_lock_count = node.lock_count, node.host_lock_count
    upper.n_host_readers = node.n_host_readers
    upper.stored_in, upper.received = node.stored_in, node.received
    upper.hit_count, upper.priority = node.hit_count, node.priority
    if node.digests is not None:
        upper.digests = node.digests[: at * DIGEST_NBYTES]
        node.digests = node.digests[at * DIGEST_NBYTES :]
    return upper
