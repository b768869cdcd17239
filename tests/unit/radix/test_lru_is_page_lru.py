"""Under lru the tree keeps exactly the pages that a plain LRU over pages would keep."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.radix.model import pages_of
from tests.unit.radix.server import TreeServer, prompt


class PageLRU:
    """The dumb model: one list of pages; a use moves its pages to the end, deepest first."""

    def __init__(self, capacity: int, page_nbytes: int) -> None:
        self.capacity = capacity
        self.page_nbytes = page_nbytes
        self.pages: OrderedDict[bytes, None] = OrderedDict()

    def request(self, tokens: bytes) -> int:
        """Serve a prompt; returns how many leading pages were there."""
        step = self.page_nbytes
        names = [tokens[:end] for end in range(step, len(tokens) + 1, step)]
        n_hits = 0
        while n_hits < len(names) and names[n_hits] in self.pages:
            n_hits += 1
        for name in reversed(names[:n_hits]):
            self.pages.move_to_end(name)
        while len(self.pages) + len(names) - n_hits > self.capacity:
            self.pages.popitem(last=False)
        for name in reversed(names):
            self.pages[name] = None
            self.pages.move_to_end(name)
        return n_hits


def assert_equal_caches(capacity: int, page_size: int, requests: list[bytes]) -> int:
    """Serve all requests on both; hits and content are equal after each."""
    model, server = PageLRU(capacity, 4 * page_size), TreeServer("lru", capacity, page_size)
    n_hits = 0
    for tokens in requests:
        hits = server.request(tokens)
        assert hits == model.request(tokens)
        server.tree.check_integrity()
        assert {name for _, name in pages_of(server.tree, 4 * page_size)} == set(model.pages)
        n_hits += hits
    return n_hits


@pytest.mark.parametrize("page_size", [1, 4])
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=40),
    capacity=st.integers(8, 20),
)
@settings(max_examples=60, deadline=None)
def test_any_requests(page_size: int, prompts: list[list[int]], capacity: int) -> None:
    """Prompts that part anywhere, in a cache that holds one to three of them."""
    assert_equal_caches(capacity, page_size, [prompt(page_size, items) for items in prompts])


def test_conversations() -> None:
    """A seeded workload of growing conversations over shared system prompts."""
    rng = random.Random(7)
    talks = [[rng.randrange(3)] * 6 for _ in range(30)]
    requests = []
    for _ in range(400):
        talk = talks[min(int(rng.expovariate(0.15)), 29)]
        talk += [rng.randrange(1000) for _ in range(rng.randrange(1, 5))]
        if len(talk) > 40:
            del talk[6:]
        requests.append(prompt(4, talk))
    n_pages = sum(len(tokens) // 16 for tokens in requests)
    n_hits = assert_equal_caches(160, 4, requests)
    assert 0 < n_hits < n_pages - len(requests)
