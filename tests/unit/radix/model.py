"""A dumb model of the prefix index: a dict of pages, walked from the front each time."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

from hicache_core.radix import Node, RadixTree
from hicache_core.radix.node import descendants, path_to_root

Path = tuple[bytes, bytes]
"""A page's name: the seed, and the packed tokens of the prompt up to the page's end."""


@dataclass
class PageModel:
    """The copies of one page."""

    device: int | None = None
    host: int | None = None
    host_pending: bool = False
    loading: bool = False


@dataclass
class TreeModel:
    """What the tree should know."""

    page_nbytes: int
    pages: dict[Path, PageModel] = field(default_factory=dict)
    locks: Counter[Path] = field(default_factory=Counter)
    host_locks: Counter[Path] = field(default_factory=Counter)
    readers: Counter[Path] = field(default_factory=Counter)
    doomed: dict[Path, int] = field(default_factory=dict)

    def paths(self, seed: bytes, tokens: bytes) -> list[Path]:
        """Names of the whole pages of a prompt."""
        ends = range(self.page_nbytes, len(tokens) + 1, self.page_nbytes)
        return [(seed, tokens[:end]) for end in ends]

    def match(self, seed: bytes, tokens: bytes) -> tuple[list[int], list[int]]:
        """Device pages, then host pages."""
        device: list[int] = []
        host: list[int] = []
        for path in self.paths(seed, tokens):
            page = self.pages.get(path)
            if page is None:
                break
            if page.device is not None and not host:
                device.append(page.device)
            elif page.host is not None and not page.host_pending and path not in self.doomed:
                host.append(page.host)
            else:
                break
        return device, host

    def below(self, path: Path) -> list[Path]:
        """Pages after this one, on any branch."""
        seed, tokens = path
        return [
            other
            for other in self.pages
            if other[0] == seed and len(other[1]) > len(tokens) and other[1].startswith(tokens)
        ]

    def is_locked(self, path: Path, locks: Counter[Path]) -> bool:
        """A lock stands on this page or after it."""
        return any(
            other[0] == path[0] and other[1].startswith(path[1]) for other in locks if locks[other]
        )

    def may_drop_device(self, path: Path) -> bool:
        """The rule, page by page, for a page and nothing after it on the device."""
        page = self.pages[path]
        has_host = page.host is not None and not page.host_pending
        return (
            page.device is not None
            and not self.is_locked(path, self.locks)
            and (has_host or not self.is_locked(path, self.host_locks))
            and all(self.pages[other].device is None for other in self.below(path))
        )

    def may_drop_host(self, path: Path) -> bool:
        """Likewise for the host; only the page right below counts."""
        page = self.pages[path]
        below = [p for p in self.below(path) if len(p[1]) == len(path[1]) + self.page_nbytes]
        return (
            page.host is not None
            and not page.host_pending
            and not self.is_locked(path, self.host_locks)
            and (page.device is not None or not self.is_locked(path, self.locks))
            and all(self.pages[other].host is None for other in below)
        )

    def may_spare_host(self, path: Path) -> bool:
        """Both tiers have the page, and no store and no load reads it."""
        page = self.pages[path]
        return (
            page.device is not None
            and page.host is not None
            and not page.host_pending
            and not page.loading
            and not self.readers[path]
        )

    def remove_with_all_below(self, path: Path) -> list[int]:
        """Forget a page and what stands after it; returns the host pages that this frees."""
        gone = [path, *self.below(path)]
        freed = [self.pages[p].host for p in gone]
        for p in gone:
            assert self.pages[p].device is None
            del self.pages[p]
        return [page for page in freed if page is not None]


def prefix_of(node: Node) -> Path:
    """Seed and tokens from the root to the end of ``node``."""
    members = [*path_to_root(node)][::-1]
    root = members[0].parent if members else node
    assert root is not None
    return root.key, b"".join(bytes(member.tokens) for member in members)


def all_nodes(tree: RadixTree) -> list[Node]:
    """Every node, without the roots."""
    return [node for root in tree.roots for node in descendants(root)]


def pages_of(tree: RadixTree, page_nbytes: int) -> dict[Path, PageModel]:
    """The tree, page by page."""
    pages: dict[Path, PageModel] = {}
    for node in all_nodes(tree):
        seed, tokens = prefix_of(node)
        for i in range(node.n_pages):
            end = (node.depth_pages + i + 1) * page_nbytes
            pages[seed, tokens[:end]] = PageModel(
                device=None if node.device_pages is None else node.device_pages[i],
                host=None if node.host_pages is None else node.host_pages[i],
                host_pending=node.host_pending,
                loading=node.device_pending,
            )
    return pages


def ids(start: int, n: int) -> array[int]:
    """Page ids ``start .. start + n``."""
    return array("i", range(start, start + n))
