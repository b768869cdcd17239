"""The tree against the dumb model: any sequence of calls, every invariant after each."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hicache_core.kv.keys import page_digests
from hicache_core.radix import POLICY_NAMES, Node, RadixTree, eviction_policy
from hicache_core.radix.node import path_to
from tests.unit.radix.model import (
    PageModel,
    Path,
    TreeModel,
    all_nodes,
    ids,
    pages_of,
    prefix_of,
)

SEEDS = st.sampled_from([b"", b"\1" * 32])
PROMPTS = st.lists(st.integers(0, 1), max_size=7)
PICKS = st.integers(0, 1000)


@dataclass
class Copy:
    """A copy in flight: the run that ends at ``node``."""

    node: Node
    paths: list[Path]

    def __post_init__(self) -> None:
        """The last page names the lock, also when no page is left to come."""
        self.end = self.paths[-1]


class TreeMachine(RuleBasedStateMachine):
    """Every call of the tree, in any order that its contract allows."""

    page_size = 4
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        policies = eviction_policy(self.policy), eviction_policy(self.policy)
        self.tree = RadixTree(self.page_size, *policies)
        self.page_nbytes = 4 * self.page_size
        self.model = TreeModel(self.page_nbytes)
        self.next_page = 0
        self.locked: list[Node] = []
        self.host_locked: list[Copy] = []
        self.to_host: list[Copy] = []
        self.to_device: list[Copy] = []

    def tokens(self, prompt: list[int], tail: int = 0) -> bytes:
        """A page for each item: all its tokens are that item, and an incomplete page after."""
        whole = b"".join(bytes([item, 0, 0, 0]) * self.page_size for item in prompt)
        return whole + bytes([9, 0, 0, 0]) * (tail % self.page_size)

    def new_ids(self, n: int) -> array[int]:
        self.next_page += n
        return ids(self.next_page - n, n)

    def run_paths(self, node: Node, n_pages: int) -> list[Path]:
        return self.model.paths(*prefix_of(node))[-n_pages:] if n_pages else []

    # -- reading and inserting ---------------------------------------------------------------

    @rule(prompt=PROMPTS, seed=SEEDS, tail=st.integers(0, 3))
    def match(self, prompt: list[int], seed: bytes, tail: int) -> None:
        tokens = self.tokens(prompt, tail)
        peeked = self.tree.match(tokens, seed, touch=False)
        match = self.tree.match(tokens, seed)
        device, host = self.model.match(seed, tokens)
        assert (peeked.device_pages.tolist(), peeked.host_pages.tolist()) == (device, host)
        assert (match.device_pages.tolist(), match.host_pages.tolist()) == (device, host)
        whole = tokens[: (len(device) + len(host)) * self.page_nbytes]
        assert prefix_of(match.node) == (seed, whole)
        assert prefix_of(match.device_node) == (seed, tokens[: len(device) * self.page_nbytes])
        assert match.n_tokens == len(whole) // 4

    @rule(prompt=PROMPTS, seed=SEEDS, tail=st.integers(0, 3), priority=st.integers(-1, 2))
    def insert(self, prompt: list[int], seed: bytes, tail: int, priority: int) -> None:
        tokens = self.tokens(prompt, tail)
        mine = self.new_ids(len(prompt))
        canonical: list[int] = []
        duplicates: list[int] = []
        for path, page_id in zip(self.model.paths(seed, tokens), mine, strict=True):
            page = self.model.pages.setdefault(path, PageModel())
            if page.device is None:
                page.device = page_id
            else:
                duplicates.append(page_id)
            canonical.append(page.device)
        result = self.tree.insert(tokens, mine, seed, priority=priority)
        assert result.pages.tolist() == canonical
        assert result.duplicates.tolist() == duplicates
        assert result.n_known_pages == len(duplicates)
        assert sum(node.n_pages for node in result.new_nodes) == len(prompt) - len(duplicates)
        assert prefix_of(result.node) == (seed, self.tokens(prompt))

    @rule(pick=PICKS)
    def digests(self, pick: int) -> None:
        nodes = all_nodes(self.tree)
        if nodes:
            node = nodes[pick % len(nodes)]
            seed, tokens = prefix_of(node)
            whole = page_digests(tokens, self.page_size, seed)
            assert self.tree.digests(node) == whole[-32 * node.n_pages :]
            path = path_to(node)
            assert b"".join(map(self.tree.digests, path)) == whole
            assert self.tree.last_digest(node) == whole[-32:]
            assert path[-1] is node

    @rule(prompt=PROMPTS, seed=SEEDS)
    def locate(self, prompt: list[int], seed: bytes) -> None:
        """As a match, and the orders stay as they are but for the node that a split adds."""
        tokens = self.tokens(prompt)
        before = [list(self.tree._residency.device_order), list(self.tree._residency.host_order)]
        match = self.tree.locate(tokens, seed)
        device, host = self.model.match(seed, tokens)
        assert (match.device_pages.tolist(), match.host_pages.tolist()) == (device, host)
        assert prefix_of(match.node) == (seed, tokens[: match.n_tokens * 4])
        after = [list(self.tree._residency.device_order), list(self.tree._residency.host_order)]
        for old, new in zip(before, after, strict=True):
            assert [node for node in new if node in set(old)] == old

    @rule(pick=PICKS, n_pages=st.integers(1, 6))
    def split(self, pick: int, n_pages: int) -> None:
        nodes = [node for node in all_nodes(self.tree) if node.n_pages > n_pages]
        if nodes:
            node = nodes[pick % len(nodes)]
            upper = self.tree.split(node, n_pages)
            assert (upper.n_pages, node.parent) == (n_pages, upper)

    # -- locks -------------------------------------------------------------------------------

    @rule(pick=PICKS)
    def lock(self, pick: int) -> None:
        # No match and no insert hands out a node that only a prefetch in flight has.
        nodes = [node for node in all_nodes(self.tree) if node.on_device or node.on_host]
        if nodes:
            node = nodes[pick % len(nodes)]
            self.tree.lock(node)
            self.locked.append(node)
            self.model.locks[prefix_of(node)] += 1

    @precondition(lambda self: self.locked)
    @rule(pick=PICKS)
    def unlock(self, pick: int) -> None:
        node = self.locked.pop(pick % len(self.locked))
        self.model.locks[prefix_of(node)] -= 1
        self.tree.unlock(node)

    @rule(pick=PICKS)
    def storage_write_begins(self, pick: int) -> None:
        nodes = [node for node in all_nodes(self.tree) if node.on_host]
        if nodes:
            node = nodes[pick % len(nodes)]
            self.tree.lock_host(node, node.n_pages)
            copy = Copy(node, self.run_paths(node, node.n_pages))
            self.host_locked.append(copy)
            self.model.readers.update(copy.paths)
            self.model.host_locks[prefix_of(node)] += 1

    @precondition(lambda self: self.host_locked)
    @rule(pick=PICKS)
    def storage_write_ends(self, pick: int) -> None:
        copy = self.host_locked.pop(pick % len(self.host_locked))
        self.model.host_locks[copy.paths[-1]] -= 1
        self.model.readers.subtract(copy.paths)
        self.tree.unlock_host(copy.node, len(copy.paths))

    # -- copies ------------------------------------------------------------------------------

    @rule(pick=PICKS)
    def backup_begins(self, pick: int) -> None:
        nodes = [
            node
            for node in all_nodes(self.tree)
            if node.on_device and not node.device_pending and node.host_pages is None
        ]
        if nodes:
            node = nodes[pick % len(nodes)]
            self._begin_to_host(node, self.new_ids(node.n_pages), is_new=False)

    @rule(prompt=PROMPTS, seed=SEEDS)
    def prefetch_begins(self, prompt: list[int], seed: bytes) -> None:
        tokens = self.tokens(prompt)
        match = self.tree.match(tokens, seed)
        rest = tokens[match.n_tokens * 4 :]
        if rest:
            pages = self.new_ids(len(rest) // self.page_nbytes)
            leaf = self.tree.insert_host(match.node, rest, pages)
            first = (seed, tokens[: match.n_tokens * 4 + self.page_nbytes])
            assert (leaf is None) == (first in self.model.pages)
            if leaf is not None:
                self._begin_to_host(leaf, pages, is_new=True)

    @rule(prompt=PROMPTS, seed=SEEDS)
    def prefetch_at_once(self, prompt: list[int], seed: bytes) -> None:
        n_before = len(self.to_host)
        self.prefetch_begins(prompt, seed)
        if len(self.to_host) > n_before:
            self.copy_to_host_ends(n_before, len(prompt))

    def _begin_to_host(self, node: Node, pages: array[int], *, is_new: bool) -> None:
        if not is_new:
            self.tree.attach_host(node, pages)
        paths = self.run_paths(node, node.n_pages)
        for path, page_id in zip(paths, pages, strict=True):
            page = self.model.pages.setdefault(path, PageModel())
            page.host, page.host_pending = page_id, True
        self.model.locks[paths[-1]] += 1
        self.to_host.append(Copy(node, paths))

    @precondition(lambda self: self.to_host)
    @rule(pick=PICKS, n_ready=st.integers(0, 7))
    def part_arrives_on_host(self, pick: int, n_ready: int) -> None:
        copy = self.to_host[pick % len(self.to_host)]
        n_ready = min(n_ready, len(copy.paths))
        ready = self.tree.commit_host(copy.node, len(copy.paths), n_ready)
        assert sum(node.n_pages for node in ready) == n_ready
        for path in copy.paths[:n_ready]:
            self.model.pages[path].host_pending = False
        del copy.paths[:n_ready]

    @precondition(lambda self: self.to_host)
    @rule(pick=PICKS, n_valid=st.integers(0, 7))
    def copy_to_host_ends(self, pick: int, n_valid: int) -> None:
        copy = self.to_host.pop(pick % len(self.to_host))
        n_valid = min(n_valid, len(copy.paths))
        self.model.locks[copy.end] -= 1
        freed: list[int | None] = []
        for i, path in enumerate(copy.paths):
            page = self.model.pages[path]
            page.host_pending = False
            if i >= n_valid:
                freed.append(page.host)
                page.host = None
                if page.device is None:
                    del self.model.pages[path]
        assert self.tree.settle_host(copy.node, len(copy.paths), n_valid).tolist() == freed

    @rule(prompt=PROMPTS, seed=SEEDS)
    def load_back_begins(self, prompt: list[int], seed: bytes) -> None:
        match = self.tree.match(self.tokens(prompt), seed)
        n_pages = len(match.host_pages)
        if n_pages:
            pages = self.new_ids(n_pages)
            self.tree.attach_device(match.node, n_pages, pages)
            paths = self.run_paths(match.node, n_pages)
            for path, page_id in zip(paths, pages, strict=True):
                self.model.pages[path].device = page_id
                self.model.pages[path].loading = True
            self.model.locks[paths[-1]] += 1
            self.model.host_locks[paths[-1]] += 1
            self.to_device.append(Copy(match.node, paths))

    @rule(prompt=PROMPTS, seed=SEEDS)
    def load_back_in_parts(self, prompt: list[int], seed: bytes) -> None:
        for end in range(1, len(prompt) + 1, 2):
            self.load_back_begins(prompt[:end], seed)

    @precondition(lambda self: self.to_device)
    @rule(pick=PICKS, ok=st.booleans())
    def load_back_ends(self, pick: int, ok: bool) -> None:
        copy = self.to_device.pop(pick % len(self.to_device))
        model = self.model
        after = [p for p in model.below(copy.paths[0]) if p not in copy.paths]
        after = [p for p in after if model.pages[p].device is not None]
        if not all(model.pages[p].loading for p in after):
            ok = True  # nobody may insert below a run before its load is known to be good
        freed: list[int | None] = []
        if copy.paths[0] in model.doomed:
            freed = [model.doomed.pop(path) for path in copy.paths]
        else:
            for path in copy.paths:
                page = model.pages[path]
                page.loading = False
                if not ok:
                    freed.append(page.device)
                    page.device = None
            for path in [] if ok else after:
                page = model.pages[path]
                assert page.device is not None
                model.doomed[path] = page.device
                page.device, page.loading = None, False
        model.locks[copy.paths[-1]] -= 1
        model.host_locks[copy.paths[-1]] -= 1
        settled = self.tree.settle_device(copy.node, len(copy.paths), ok=ok)
        assert settled.tolist() == freed

    # -- eviction ----------------------------------------------------------------------------

    @rule(max_pages=st.integers(1, 4))
    def evict_from_device(self, max_pages: int) -> None:
        node = self.tree.device_victim(max_pages)
        if node is None:
            assert not any(map(self.model.may_drop_device, self.model.pages))
            return
        assert node.n_pages <= max_pages
        paths = self.run_paths(node, node.n_pages)
        device: list[int | None] = []
        host: list[int] = []
        for path in reversed(paths):
            assert self.model.may_drop_device(path)
            page = self.model.pages[path]
            device.insert(0, page.device)
            page.device = None
            if page.host is None:
                host += self.model.remove_with_all_below(path)
        dropped = self.tree.drop_device(node)
        assert dropped.device_pages.tolist() == device
        assert sorted(dropped.host_pages) == sorted(host)

    @rule(max_pages=st.integers(1, 4))
    def evict_from_host(self, max_pages: int) -> None:
        node = self.tree.host_victim(max_pages)
        if node is None:
            # A locked node whose turn came rests until it is unlocked, though its host copy is
            # spare; so "none" is only sure to be right for pages without any lock.
            free = [p for p in self.model.pages if not self.model.is_locked(p, self.model.locks)]
            assert not any(map(self.model.may_drop_host, free))
            return
        assert node.n_pages <= max_pages
        host: list[int | None] = []
        for path in reversed(self.run_paths(node, node.n_pages)):
            assert self.model.may_drop_host(path)
            page = self.model.pages[path]
            host.insert(0, page.host)
            page.host = None
            if page.device is None:
                assert not self.model.remove_with_all_below(path)
        dropped = self.tree.drop_host(node)
        assert (dropped.device_pages.tolist(), dropped.host_pages.tolist()) == ([], host)

    @rule(pick=PICKS)
    def spare_host(self, pick: int) -> None:
        """A host copy in the middle of a prefix may go, where the device has the pages too."""
        nodes = [node for node in all_nodes(self.tree) if node.may_spare_host()]
        if nodes:
            node = nodes[pick % len(nodes)]
            host: list[int | None] = []
            for path in reversed(self.run_paths(node, node.n_pages)):
                assert self.model.may_spare_host(path) or self.model.may_drop_host(path)
                page = self.model.pages[path]
                host.insert(0, page.host)
                page.host = None
                if page.device is None:
                    assert not self.model.remove_with_all_below(path)
            assert self.tree.drop_host(node).host_pages.tolist() == host

    # -- after each step ---------------------------------------------------------------------

    @invariant()
    def tree_equals_model(self) -> None:
        self.tree.check_integrity()
        assert pages_of(self.tree, self.page_nbytes) == self.model.pages

    @invariant()
    def counts_are_right(self) -> None:
        pages = self.model.pages.values()
        n_device = sum(page.device is not None for page in pages) + len(self.model.doomed)
        assert self.tree.n_device_pages == n_device
        assert self.tree.n_host_pages == sum(page.host is not None for page in pages)

    def teardown(self) -> None:
        """Whatever happened, everything settles, unlocks and can be evicted to nothing."""
        while self.to_host:
            self.copy_to_host_ends(0, 1)
        while self.to_device:
            self.load_back_ends(0, ok=True)
        while self.host_locked:
            self.storage_write_ends(0)
        while self.locked:
            self.unlock(0)
        for _ in range(self.tree.n_device_pages):
            self.evict_from_device(3)
        for _ in range(self.tree.n_host_pages):
            self.evict_from_host(3)
        assert self.tree.n_nodes == 0
        self.tree_equals_model()


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_tree_equals_the_model(policy: str, page_size: int) -> None:
    """No sequence of calls makes the tree and the page-by-page model disagree."""
    machine: type[TreeMachine] = type(
        f"Machine_{policy}_{page_size}", (TreeMachine,), {"policy": policy, "page_size": page_size}
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
