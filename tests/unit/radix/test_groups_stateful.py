"""Windows and states in the tree against a dumb model: a dict of units for each group."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
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

from hicache_core.errors import IntegrityError
from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec
from hicache_core.pools.allocator import PageAllocator
from hicache_core.pools.pins import PinnedUnits
from hicache_core.radix import POLICY_NAMES, Node, RadixTree, eviction_policy
from hicache_core.radix.holdings import Holdings, Run
from hicache_core.radix.queues import QueueOrder
from hicache_core.radix.results import LACKING, NewUnits, Units
from tests.unit.radix.model import all_nodes, prefix_of

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=7)
PICKS = st.integers(0, 1000)
PAGE_SIZE = 2
N_UNITS = 800

Path = tuple[int, ...]
"""A page's name: one number for each page of the prefix that ends with it."""


def group_of(name: str, window: int = 0) -> Group:
    kind = GroupKind.WINDOW if window else GroupKind.STATE
    spec = KVSpec((Component("k", (1, 2), "float16"),), 1, "a model", (0, 1), (0, 1, 1))
    return Group(name, kind, spec, window)


GROUPS = (group_of("swa", 4), group_of("swa_1", 9), group_of("mamba"))


@dataclass
class Unit:
    """The copies of one unit."""

    device: int | None = None
    host: int | None = None


@dataclass
class Call:
    """A call that reads units of a node, in the tier of ``pool``."""

    group: int
    pool: PinnedUnits
    units: array[int]
    run: Run


def needed(group: Group, n_pages: int) -> range:
    """The pages that the next token attends to, token by token."""
    if group.kind is GroupKind.STATE:
        return range(max(0, n_pages - 1), n_pages)
    n_tokens = n_pages * PAGE_SIZE
    tokens = [token for token in range(n_tokens) if n_tokens - token < group.window]
    return range(tokens[0] // PAGE_SIZE, n_pages) if tokens else range(n_pages, n_pages)


class GroupsMachine(RuleBasedStateMachine):
    """What the tree is told of groups, in any order that its contract allows."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        policies = eviction_policy(self.policy), eviction_policy(self.policy)
        self.held = [
            Holdings(group, PAGE_SIZE, policies, *(_pool() for _ in range(2))) for group in GROUPS
        ]
        self.tree = RadixTree(PAGE_SIZE, *policies, self.held)
        self.full: dict[Path, Unit] = {}
        self.units: list[dict[Path, Unit]] = [{} for _ in GROUPS]
        self.locked: list[Node] = []
        self.calls: list[Call] = []
        self.next_page = 0

    def new_pages(self, n: int) -> array[int]:
        self.next_page += n
        return array("i", range(self.next_page - n, self.next_page))

    # What the model says.

    def n_full(self, prompt: Path) -> int:
        """Leading pages that device or host has, the host's after the device's."""
        n = 0
        while n < len(prompt) and prompt[: n + 1] in self.full:
            n += 1
        return n

    def lacking(self, prompt: Path, *, on_device: bool = False) -> str:
        """The first group that does not have all that is needed after ``prompt``; or empty."""
        for group, units in zip(GROUPS, self.units, strict=True):
            for page in needed(group, len(prompt)):
                unit = units.get(prompt[: page + 1])
                if unit is None or (on_device and unit.device is None):
                    return group.name
        return ""

    def expected(self, prompt: Path) -> tuple[Units, ...]:
        """What a match that ends after ``prompt`` says of each group."""
        found: list[Units] = []
        for group, units in zip(GROUPS, self.units, strict=True):
            first = len(prompt)
            for page in reversed(needed(group, len(prompt))):
                if prompt[: page + 1] not in units:
                    break
                first = page
            there = [units[prompt[: page + 1]] for page in range(first, len(prompt))]
            device = array("i", [_id(unit.device) for unit in there])
            host = array("i", [LACKING if u.device is not None else _id(u.host) for u in there])
            found.append(Units(first, device, host))
        return tuple(found)

    def locks(self, at: int) -> Counter[Path]:
        """Pages of a group whose units a lock keeps."""
        found: Counter[Path] = Counter()
        for node in self.locked:
            path = path_of(node)
            found.update(path[: page + 1] for page in needed(GROUPS[at], len(path)))
        return found

    def reads(self, at: int, unit: int | None, *, on_host: bool) -> bool:
        pool = self.held[at].host if on_host else self.held[at].device
        return any(call.pool is pool and unit in call.units for call in self.calls)

    # Matches and inserts.

    @rule(prompt=PROMPTS, touch=st.booleans())
    def match(self, prompt: list[int], touch: bool) -> None:
        match = self.tree.match(tokens_of(prompt), touch=touch)
        n_full = n = self.n_full(tuple(prompt))
        while n and self.lacking(tuple(prompt[:n])):
            n -= 1
        assert match.n_tokens == n * PAGE_SIZE
        assert match.n_uncut_tokens == n_full * PAGE_SIZE
        assert match.cut_by == (self.lacking(tuple(prompt[:n_full])) if n < n_full else "")
        if n:
            assert match.groups == self.expected(tuple(prompt[:n]))
        else:
            assert not any(len(units.device) for units in match.groups)
        if touch:
            assert path_of(match.node) == tuple(prompt[:n])
            assert self.tree.units(match.node) == match.groups

    @rule(prompt=PROMPTS)
    def device_part(self, prompt: list[int]) -> None:
        match = self.tree.match(tokens_of(prompt))
        part = self.tree.device_part(match)
        n = len(match.device_pages)
        while n and self.lacking(tuple(prompt[:n]), on_device=True):
            n -= 1
        assert (part.n_tokens, part.host_pages) == (n * PAGE_SIZE, array("i"))
        assert path_of(part.node) == tuple(prompt[:n])
        assert all(LACKING not in units.device for units in part.groups)

    @rule(prompt=PROMPTS, spans=st.lists(st.tuples(PICKS, PICKS), max_size=3), each=st.booleans())
    def insert(self, prompt: list[int], spans: list[tuple[int, int]], each: bool) -> None:
        """The window groups get runs, the state snapshots; ``each`` gives all units of all."""
        pages, path = self.new_pages(len(prompt)), tuple(prompt)
        runs = [
            [(0, len(prompt))] if each and group.window else _spans(group, len(prompt), spans)
            for group in GROUPS
        ]
        new = [
            [
                NewUnits(first, held.device.allocate(stop - first if held.group.window else 1))
                for first, stop in group_runs
            ]
            for held, group_runs in zip(self.held, runs, strict=True)
        ]
        for page, page_id in enumerate(pages):
            full = self.full.setdefault(path[: page + 1], Unit())
            full.device = page_id if full.device is None else full.device
        duplicates = [
            [unit for run in group_runs for unit in self._take(at, path, run)]
            for at, group_runs in enumerate(new)
        ]
        result = self.tree.insert(tokens_of(prompt), pages, groups=new)
        assert [list(units) for units in result.unit_duplicates] == duplicates
        assert result.units == self.expected(path)
        assert path_of(result.node) == path
        for held, units in zip(self.held, result.unit_duplicates, strict=True):
            held.device.free(units)

    def _take(self, at: int, path: Path, run: NewUnits) -> list[int]:
        """Gives a run to the model; what it has already comes back."""
        duplicates = []
        for page, unit in enumerate(run.device, run.first):
            mine = self.units[at].setdefault(path[: page + 1], Unit())
            if mine.device is None:
                mine.device = unit
            else:
                duplicates.append(unit)
        return duplicates

    @rule(prompt=PROMPTS, at=st.integers(0, 2), first=PICKS, n=st.integers(0, 7))
    def units_arrive_on_the_host(self, prompt: list[int], at: int, first: int, n: int) -> None:
        path, held = tuple(prompt), self.held[at]
        node = self.tree.locate(tokens_of(prompt)).node
        first %= len(path)
        n = min(n, len(path) - first) if held.group.window else min(n, 1)
        assert held.host is not None
        units = held.host.allocate(n)
        freed = []
        for page, unit in enumerate(units, first):
            known = self.n_full(path) > page
            mine = self.units[at].setdefault(path[: page + 1], Unit()) if known else Unit(host=0)
            if mine.host is None:
                mine.host = unit
            else:
                freed.append(unit)
        back = self.tree.insert_host_units(node, at, first, units, 1)
        assert sorted(back) == sorted(freed)
        held.host.free(back)

    @rule(pick=PICKS, n_pages=st.integers(1, 6))
    def split(self, pick: int, n_pages: int) -> None:
        nodes = [node for node in all_nodes(self.tree) if node.n_pages > n_pages]
        if nodes:
            self.tree.split(nodes[pick % len(nodes)], n_pages)

    # Locks and calls.

    @rule(prompt=PROMPTS)
    def lock(self, prompt: list[int]) -> None:
        node = self.tree.match(tokens_of(prompt)).node
        self.tree.lock(node)
        self.locked.append(node)

    @precondition(lambda self: self.locked)
    @rule(pick=PICKS)
    def unlock(self, pick: int) -> None:
        self.tree.unlock(self.locked.pop(pick % len(self.locked)))

    @rule(pick=PICKS, at=st.integers(0, 2), on_host=st.booleans())
    def call_begins(self, pick: int, at: int, on_host: bool) -> None:
        """A copy or a store pins the units of a node, and follows it."""
        held = self.held[at]
        nodes = [n for n in all_nodes(self.tree) if _units(held, n, on_host=on_host) is not None]
        if nodes:
            node = nodes[pick % len(nodes)]
            pool, units = held.host if on_host else held.device, _units(held, node, on_host=on_host)
            assert pool is not None
            assert units is not None
            call = Call(at, pool, units[:], held.follow(node))
            pool.pin(call.units)
            self.calls.append(call)

    @precondition(lambda self: self.calls)
    @rule(pick=PICKS)
    def call_ends(self, pick: int) -> None:
        call = self.calls.pop(pick % len(self.calls))
        call.pool.unpin(call.units)
        self.held[call.group].unfollow(call.run)

    @rule(pick=PICKS, at=st.integers(0, 2))
    def backup(self, pick: int, at: int) -> None:
        """A copy to the host, ended at once."""
        held = self.held[at]
        there = [node for node in all_nodes(self.tree) if held.get(node) is not None]
        nodes = [node for node in there if _units(held, node, on_host=False) is not None]
        if nodes:
            node = nodes[pick % len(nodes)]
            assert held.host is not None
            units = held.host.allocate(held.n_units(node))
            is_new = _units(held, node, on_host=True) is None
            assert held.gain_host(node, units) == is_new
            if not is_new:
                held.host.free(units)
                return
            for path, unit in zip(unit_paths(held, node), units, strict=True):
                self.units[at][path].host = unit

    # Who leaves.

    @rule(at=st.integers(0, 2), most=st.integers(1, 4))
    def evict_from_device(self, at: int, most: int) -> None:
        held, locks = self.held[at], self.locks(at)
        node = held.device_victim(most, self.tree.split)
        may_go = [
            path
            for path, unit in self.units[at].items()
            if unit.device is not None
            and not locks[path]
            and not self.reads(at, unit.device, on_host=False)
        ]
        if node is None:
            assert not may_go
            return
        paths = unit_paths(held, node)
        assert set(paths) <= set(may_go)
        assert len(paths) == held.drop_device(node) <= most
        self._lose(at, paths, on_host=False)

    @rule(at=st.integers(0, 2), most=st.integers(1, 4))
    def evict_from_host(self, at: int, most: int) -> None:
        held, locks = self.held[at], self.locks(at)
        node = held.host_victim(most, self.tree.split)
        may_go = {
            path
            for path, unit in self.units[at].items()
            if unit.host is not None
            and (unit.device is not None or not locks[path])
            and not self.reads(at, unit.host, on_host=True)
        }
        if node is None:  # a locked one whose turn came rests until it is unlocked
            assert all(locks[path] for path in may_go)
            return
        paths = unit_paths(held, node)
        assert may_go.issuperset(paths)
        assert len(paths) == held.drop_host(node) <= most
        self._lose(at, paths, on_host=True)

    def _lose(self, at: int, paths: Sequence[Path], *, on_host: bool) -> None:
        for path in paths:
            unit = self.units[at][path]
            if on_host:
                unit.host = None
            else:
                unit.device = None
            if unit.device is None and unit.host is None:
                del self.units[at][path]

    @rule(pick=PICKS)
    def full_pages_get_a_host_copy(self, pick: int) -> None:
        nodes = [node for node in all_nodes(self.tree) if node.host_pages is None]
        if nodes:
            node = nodes[pick % len(nodes)]
            pages = self.new_pages(node.n_pages)
            for path, page in zip(page_paths(node), pages, strict=True):
                self.full[path].host = page
            self.tree.attach_host(node, pages)
            self.tree.settle_host(node, node.n_pages, node.n_pages)

    @rule(most=st.integers(1, 4), on_host=st.booleans())
    def full_pages_leave(self, most: int, on_host: bool) -> None:
        """What leaves the tree takes its units along, read or not."""
        victim = self.tree.host_victim if on_host else self.tree.device_victim
        node = victim(most)
        if node is None:
            return
        paths = page_paths(node)
        (self.tree.drop_host if on_host else self.tree.drop_device)(node)
        for path in paths:
            page = self.full[path]
            page.device, page.host = (page.device, None) if on_host else (None, page.host)
        if not node.in_tree:
            for path in [p for p in self.full if p[: len(paths[0])] == paths[0]]:
                del self.full[path]
                for units in self.units:
                    units.pop(path, None)

    # After each step.

    @invariant()
    def tree_equals_model(self) -> None:
        self.tree.check_integrity()
        for at, held in enumerate(self.held):
            found = {}
            for node in held.nodes():
                device, host = (_units(held, node, on_host=tier) for tier in (False, True))
                for i, path in enumerate(unit_paths(held, node)):
                    found[path] = Unit(device and device[i], host and host[i])
            assert found == self.units[at]

    @invariant()
    def every_unit_has_an_owner(self) -> None:
        for held in self.held:
            assert held.host is not None
            held.device.check_integrity(held.n_device_units, "device", exactly=True)
            held.host.check_integrity(held.n_host_units, "host", exactly=True)
            for order in (held._device_order, held._host_order):
                if isinstance(order, QueueOrder):  # the others list a page before those above it
                    order.check_integrity()

    def teardown(self) -> None:
        """Whatever happened, calls end, locks are taken back, and every unit can be had."""
        while self.calls:
            self.call_ends(0)
        while self.locked:
            self.unlock(0)
        for at, held in enumerate(self.held):
            while any(unit.device is not None for unit in self.units[at].values()):
                self.evict_from_device(at, 3)
            while self.units[at]:
                self.evict_from_host(at, 3)
            assert not list(held.nodes())
        self.tree.reset()
        self.full.clear()
        self.every_unit_has_an_owner()


def _pool() -> PinnedUnits:
    return PinnedUnits(PageAllocator(N_UNITS))


def _id(unit: int | None) -> int:
    return LACKING if unit is None else unit


def _spans(group: Group, n_pages: int, picks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint runs of pages, one page each for a state."""
    cuts = sorted({pick % (n_pages + 1) for pair in picks for pick in pair})
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    return pairs if group.window else [(start, start + 1) for start, _ in pairs]


def _units(held: Holdings, node: Node, *, on_host: bool) -> array[int] | None:
    holding = held.get(node)
    if holding is None:
        return None
    return holding.host if on_host else holding.device


def tokens_of(prompt: Sequence[int]) -> bytes:
    return b"".join(bytes([item, 0, 0, 0]) * PAGE_SIZE for item in prompt)


def path_of(node: Node) -> Path:
    return tuple(prefix_of(node)[1][:: 4 * PAGE_SIZE])


def page_paths(node: Node) -> list[Path]:
    path = path_of(node)
    return [path[:end] for end in range(node.depth_pages + 1, len(path) + 1)]


def unit_paths(held: Holdings, node: Node) -> list[Path]:
    return page_paths(node)[-held.n_units(node) :]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_groups_equal_the_model(policy: str) -> None:
    """No sequence of calls makes the tree and the model disagree on the units of a prefix."""
    machine: type[GroupsMachine] = type(f"Groups_{policy}", (GroupsMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.parametrize(
    "runs",
    [
        ((NewUnits(0, array("i", [0, 1, 2, 3])),), (), ()),
        ((NewUnits(3, array("i", [0])),), (), ()),
        ((NewUnits(-1, array("i", [0])),), (), ()),
        ((NewUnits(0, array("i")),), (), ()),
        ((), (), (NewUnits(0, array("i", [0, 1])),)),
        ((), (), (NewUnits(3, array("i", [0])),)),
    ],
    ids=["longer", "behind", "before", "none", "two snapshots", "a snapshot behind"],
)
def test_units_of_pages_outside_of_the_prefix_are_refused(
    runs: tuple[tuple[NewUnits, ...], ...],
) -> None:
    machine = GroupsMachine()
    with pytest.raises(IntegrityError, match="of a prefix of 3 pages"):
        machine.tree.insert(tokens_of([0, 0, 0]), array("i", [0, 1, 2]), groups=runs)
