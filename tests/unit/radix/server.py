"""A server of prompts on the device tier alone: match, lock, evict, insert, unlock."""

from __future__ import annotations

from array import array

from hicache_core.radix import RadixTree, eviction_policy


class TreeServer:
    """A cache of so many pages on the tree, served as an engine does it."""

    def __init__(self, policy: str, capacity: int, page_size: int) -> None:
        self.tree = RadixTree(page_size, eviction_policy(policy), eviction_policy(policy))
        self.free = array("i", range(capacity))
        self.page_nbytes = 4 * page_size

    def request(self, tokens: bytes) -> int:
        """Serve a prompt; returns how many leading pages were there."""
        match = self.tree.match(tokens)
        self.tree.lock(match.node)
        n_new = len(tokens) // self.page_nbytes - len(match.device_pages)
        while len(self.free) < n_new:
            victim = self.tree.device_victim(n_new - len(self.free))
            assert victim is not None
            self.free.extend(self.tree.drop_device(victim).device_pages)
        pages = match.device_pages + self.free[:n_new]
        del self.free[:n_new]
        assert not self.tree.insert(tokens, pages).duplicates
        self.tree.unlock(match.node)
        return len(match.device_pages)


def prompt(page_size: int, items: list[int]) -> bytes:
    """One page for each item."""
    return b"".join(item.to_bytes(4, "little") * page_size for item in items)
