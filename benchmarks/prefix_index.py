"""The prefix index: match, insert, chat, churn and eviction, and the memory it takes."""

from __future__ import annotations

import gc
import os
import random
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias

from benchmarks.harness import Row
from hicache_core.kv.keys import pack_tokens
from hicache_core.radix import Node, RadixTree, eviction_policy

Call: TypeAlias = Callable[[], object]

TABLE = "prefix index"
CHAT = "prefix index: chat tree"
SCALE = "prefix index: cost by size"


def make(page_size: int = 64, policy: str = "lru") -> RadixTree:
    """An empty tree, the same policy on both tiers."""
    return RadixTree(page_size, eviction_policy(policy), eviction_policy(policy))


def ids(n: int, start: int = 0) -> array[int]:
    """Page ids ``start .. start + n``."""
    return array("i", range(start, start + n))


def timed(
    table: str,
    name: str,
    calls: Iterable[Call],
    *,
    baseline: str | None = None,
    target: str | None = None,
    note: str = "",
) -> Row:
    """A row in which every call is a sample; the work of the iterator is not timed.

    Args:
        table: title of the table.
        name: of the row.
        calls: what to measure.
        baseline: name of the row to compare with.
        target: the target, in words.
        note: for the last column.
    """
    wall: list[float] = []
    cpu: list[float] = []
    gc.collect()
    gc.disable()
    for call in calls:
        cpu_start, start = time.thread_time(), time.perf_counter()
        call()
        end, cpu_end = time.perf_counter(), time.thread_time()
        wall.append((end - start) * 1e6)
        cpu.append((cpu_end - cpu_start) * 1e6)
    gc.enable()
    return Row(table, name, "µs", wall, cpu, baseline, target, note)


class Scene:
    """A tree and a prompt, made anew before each call that changes them."""

    def __init__(self, n_tokens: int, page_size: int, n_shared: int) -> None:
        self.page_size = page_size
        self.n_pages = n_tokens // page_size
        self.shared_pages = n_shared // page_size
        self.old = os.urandom(4 * n_tokens)
        self.setup()

    def setup(self) -> None:
        """A tree that knows the old prompt, and a new one that shares its first tokens."""
        shared_nbytes = 4 * self.page_size * self.shared_pages
        self.tree = make(self.page_size)
        if self.shared_pages:
            self.tree.insert(self.old, ids(self.n_pages))
        self.prompt = self.old[:shared_nbytes] + os.urandom(len(self.old) - shared_nbytes)
        fresh = ids(self.n_pages - self.shared_pages, self.n_pages)
        self.pages = ids(self.shared_pages) + fresh

    def anew(self, call: Call, repeat: int) -> Iterator[Call]:
        """``call`` again and again, each time on a new scene."""
        for _ in range(repeat):
            self.setup()
            yield call

    def insert(self) -> None:
        """What an engine does after prefill; its page ids of the known prefix are the tree's."""
        self.tree.insert(self.prompt, self.pages)

    def match(self) -> None:
        """What an engine does before prefill."""
        self.tree.match(self.prompt)


def single_rows(n_tokens: int, page_size: int, repeat: int) -> Iterator[Row]:
    """Match and insert of one long prompt, which was made just before.

    Args:
        n_tokens: length of the prompt.
        page_size: tokens in a page.
        repeat: number of samples.
    """
    size = f"{n_tokens // 1000}k tokens, page {page_size}"
    is_main = page_size == 64
    to_match, to_insert = ("≤ 40", "≤ 80") if is_main else (None, None)
    compare = f"compare the bytes, {size}"
    fresh = Scene(n_tokens, page_size, 0)
    shared = Scene(n_tokens, page_size, n_tokens * 9 // 10)
    present = Scene(n_tokens, page_size, n_tokens)
    twin = bytes(bytearray(present.prompt))

    def row(name: str, scene: Scene, call: Call, target: str | None, *, anew: bool) -> Row:
        calls = scene.anew(call, repeat) if anew else [call] * repeat
        return timed(TABLE, f"{name}, {size}", calls, baseline=compare, target=target)

    same = [lambda: twin == present.prompt] * repeat
    yield timed(TABLE, compare, same, note="one memcmp: the floor")
    yield row("match present", present, present.match, to_match, anew=False)
    yield row("match 90 % shared", shared, shared.match, None, anew=True)
    yield row("match nothing", fresh, fresh.match, None, anew=True)
    yield row("insert fresh", fresh, fresh.insert, to_insert, anew=True)
    yield row("insert 90 % shared", shared, shared.insert, to_insert, anew=True)
    yield row("insert present", present, present.insert, to_insert, anew=False)
    if is_main:
        tokens = [random.randrange(150_000) for _ in range(n_tokens)]
        convert = [lambda: pack_tokens(tokens)] * repeat
        yield timed(TABLE, f"convert a list of ints, {size}", convert)


class Server:
    """A cache with a page cap, served by match, evict and insert."""

    def __init__(self, n_pages: int, page_size: int = 64, policy: str = "lru") -> None:
        self.tree = make(page_size, policy)
        self.free = ids(n_pages)
        self.page_nbytes = 4 * page_size

    def turn(self, tokens: bytes) -> None:
        """Match, make room, insert."""
        match = self.tree.match(tokens)
        n_new = len(tokens) // self.page_nbytes - len(match.device_pages)
        if len(self.free) < n_new:
            self.make_room(match.node, n_new)
        pages = match.device_pages + self.free[len(self.free) - n_new :]
        del self.free[len(self.free) - n_new :]
        self.tree.insert(tokens, pages)

    def make_room(self, node: Node, n_pages: int) -> None:
        """Evict until ``n_pages`` are free; the path to ``node`` stays."""
        self.tree.lock(node)
        while len(self.free) < n_pages:
            victim = self.tree.device_victim(n_pages - len(self.free))
            assert victim is not None
            self.free.extend(self.tree.drop_device(victim).device_pages)
        self.tree.unlock(node)


def turns(server: Server, n_talks: int, n_turns: int) -> Iterator[Call]:
    """Conversations over a system prompt of 2,048 tokens, one turn of each after the other.

    Args:
        server: what serves the turns.
        n_talks: number of conversations.
        n_turns: turns of each.
    """
    rng = random.Random(1)
    system = os.urandom(4 * 2048)
    talks = [system] * n_talks
    for _ in range(n_turns):
        for i in range(n_talks):
            talks[i] += os.urandom(4 * rng.randrange(100, 500))
            yield lambda tokens=talks[i]: server.turn(tokens)  # type: ignore[misc]


def chat_rows(quick: bool) -> Iterator[Row]:
    """The chat tree, churn under a cap, eviction, and memory."""
    n_talks, n_turns = (200, 8) if quick else (2000, 8)
    server = Server(200_000)
    name = f"one turn (match + insert), {n_talks:,} times {n_turns} turns"
    yield timed(CHAT, name, turns(server, n_talks, n_turns), target="≤ 80")
    yield memory_row(f"Python memory, {server.tree.n_nodes:,} nodes of page 64", server.tree)
    cap, cap_tokens = ("100k", 100_000) if quick else ("1M", 1_000_000)
    name = f"one turn with eviction, cap {cap} tokens"
    yield timed(CHAT, name, turns(Server(cap_tokens // 64), n_talks, n_turns))
    for policy in ("s3fifo", "arc"):
        calls = turns(Server(cap_tokens // 64, policy=policy), n_talks, n_turns)
        yield timed(CHAT, f"{name}, {policy}", calls, baseline=name)
    n_leaves = 1500 if quick else 15_000
    for policy in ("lru", "s3fifo", "arc"):
        yield evict_row(n_leaves, policy)
    for page_size in (1, 16):
        tree = make(page_size)
        for i in range(100):
            tree.insert(os.urandom(4 * 1024), ids(1024 // page_size, i * 1024))
        yield memory_row(f"Python memory, 100 prompts of 1,024 tokens, page {page_size}", tree)


def evict_row(n_leaves: int, policy: str) -> Row:
    """Leaves of 4 pages below one system prompt, each used once more in another order."""
    tree = make(policy=policy)
    system = os.urandom(4 * 64 * 8)
    leaves = [system + os.urandom(4 * 64 * 4) for _ in range(n_leaves)]
    for i, tokens in enumerate(leaves):
        tree.insert(tokens, ids(8) + ids(4, 8 + 4 * i))
    random.Random(2).shuffle(leaves)
    for tokens in leaves:
        tree.match(tokens)

    def evict() -> None:
        victim = tree.device_victim(4)
        assert victim is not None
        tree.drop_device(victim)

    calls = (evict for _ in range(n_leaves // 5))
    name = f"evict one leaf of {n_leaves:,}"
    if policy == "lru":
        return timed(CHAT, name, calls, target="≤ 20")
    return timed(CHAT, f"{name}, {policy}", calls, baseline=name)


class Filled:
    """A tree of prompts of 2,048 tokens; each shares 1,024 with the others of its family."""

    N_OWN, N_FAMILIES = 1024, 100

    def __init__(self, n_tokens: int) -> None:
        """Inserts prompts until the tree holds ``n_tokens``."""
        self.tree = make()
        self.n_prompts = n_tokens // self.N_OWN
        self._families = [os.urandom(4 * self.N_OWN) for _ in range(self.N_FAMILIES)]
        self._n_pages = 0
        for number in range(self.n_prompts):
            self.insert(self.prompt(number))

    def prompt(self, number: int) -> bytes:
        """The prompt of a number; those from ``n_prompts`` on are new."""
        own = random.Random(number).randbytes(4 * self.N_OWN)
        return self._families[number % self.N_FAMILIES] + own

    def insert(self, tokens: bytes) -> None:
        """Inserts a prompt with new pages."""
        n = len(tokens) // (4 * self.tree.page_size)
        self.tree.insert(tokens, ids(n, self._n_pages % (1 << 30)))
        self._n_pages += n

    def evict(self) -> None:
        """Evicts one leaf."""
        victim = self.tree.device_victim(1)
        assert victim is not None
        self.tree.drop_device(victim)


def scale_rows(quick: bool) -> Iterator[Row]:
    """The same calls on a small and on a large tree, in turn."""
    sizes = (100_000, 1_000_000) if quick else (1_000_000, 100_000_000)
    trees = {f"{n:,} tokens": Filled(n) for n in sizes}
    rng = random.Random(3)
    samples: dict[str, tuple[list[float], list[float]]] = {}

    def sample(name: str, call: Call) -> None:
        cpu_start, start = time.thread_time(), time.perf_counter()
        call()
        end, cpu_end = time.perf_counter(), time.thread_time()
        wall, cpu = samples.setdefault(name, ([], []))
        wall.append((end - start) * 1e6)
        cpu.append((cpu_end - cpu_start) * 1e6)

    gc.collect()
    gc.disable()
    for turn in range(300 if quick else 3000):
        for size, filled in trees.items():
            known = filled.prompt(rng.randrange(filled.n_prompts // 2, filled.n_prompts))
            fresh = filled.prompt(filled.n_prompts + turn)
            sample(f"match 2,048 tokens, {size}", partial(filled.tree.match, known))
            sample(f"insert 1,024 new tokens, {size}", partial(filled.insert, fresh))
            sample(f"evict a leaf, {size}", filled.evict)
    gc.enable()
    small = next(iter(trees))
    for what in ("match 2,048 tokens", "insert 1,024 new tokens", "evict a leaf"):
        base = f"{what}, {small}"
        for size in trees:
            name = f"{what}, {size}"
            compare = (None, None) if name == base else (base, "≤ 1.5 ×")
            yield Row(SCALE, name, "µs", *samples[name], *compare)


def memory_row(name: str, tree: RadixTree) -> Row:
    """Bytes for each cached token; the token ids themselves are four of them."""
    per_token = tree.memory_nbytes() / (tree.n_device_pages * tree.page_size)
    return Row(CHAT, name, "B/token", [per_token], note="token ids alone are 4 B")


def rows(quick: bool) -> Iterator[Row]:
    """Every row of both tables."""
    n_tokens = 20_000 if quick else 100_000
    for page_size in (64, 16, 1):
        yield from single_rows(n_tokens, page_size, repeat=7 if quick else 31)
    yield from chat_rows(quick)
    yield from scale_rows(quick)
