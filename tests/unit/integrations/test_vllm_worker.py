"""A worker's half of the connector: real blocks of torch, a real store of files, without vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.vllm.blocks import Blocks, HostPages
from hicache_core.integrations.vllm.plans import Fetch, Load, Save, Step
from hicache_core.integrations.vllm.worker import PageMover

N_BLOCKS, N_HEADS, BLOCK, HEAD = 8, 2, 4, 16
LAYERS = ["one", "two", "three"]
NAMESPACE = "0123456789abcdef"


def hashes(*numbers: int) -> list[bytes]:
    return [bytes([n]) * 32 for n in numbers]


def caches(order: str = "BHNC", n_parts: int = 1) -> dict[str, torch.Tensor]:
    """Random KV; the logical order is block, head, token, content, whatever it is in memory."""
    shape = dict(zip("BHNC", (N_BLOCKS * n_parts, N_HEADS, BLOCK // n_parts, HEAD), strict=True))
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in LAYERS:
        laid = torch.randn([shape[axis] for axis in order], generator=generator)
        found[layer] = laid.to(torch.bfloat16).permute([order.index(axis) for axis in "BHNC"])
    return found


def _raising(error: Exception) -> Callable[[Blocks, int], HostPages]:
    def allocate(blocks: Blocks, n_pages: int) -> HostPages:
        raise error

    return allocate


class Worker:
    """A mover over its own blocks."""

    def __init__(self, folder: Path, max_pages: int = 64) -> None:
        self.caches = caches()
        blocks = Blocks(LAYERS, self.caches, N_BLOCKS)
        self.page_nbytes = blocks.page_nbytes
        store = open_store("file", {"path": str(folder)}, object_nbytes=blocks.page_nbytes)
        self.mover = PageMover(store, NAMESPACE, blocks, max_pages * blocks.page_nbytes)
        self.counts: dict[str, int] = {}

    def save(self, block_ids: list[int], names: list[bytes]) -> None:
        """Saves blocks, and waits until all are stored or dropped."""
        self.mover.after_compute(Step(saves=[Save(names, block_ids)]))
        self.wait_for("stored", "dropped", n=sum(self.counts.values()) + len(block_ids))

    def wait_for(self, *what: str, n: int) -> None:
        """Returns when so many blocks were counted."""
        until = time.monotonic() + 20
        while sum(self.counts.get(one, 0) for one in what) < n:
            assert time.monotonic() < until, self.counts
            for one, count in self.mover.take_counts().items():
                self.counts[one] = self.counts.get(one, 0) + count
            time.sleep(0.001)

    def fetch(self, fetch_id: int, names: list[bytes]) -> int:
        """Fetches pages, and returns how many are held."""
        self.mover.before_compute(Step(fetches=[Fetch(fetch_id, names)]))
        until = time.monotonic() + 20
        while True:
            reports = self.mover.take_reports()
            if reports:
                return reports[fetch_id]
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path)
    yield made
    made.mover.close()


def test_a_block_comes_back_as_it_went_into_any_other_block(worker: Worker) -> None:
    before = {layer: cache.clone() for layer, cache in worker.caches.items()}
    worker.save([5, 1, 6], hashes(1, 2, 3))
    for cache in worker.caches.values():
        cache.zero_()
    assert worker.fetch(0, hashes(1, 2, 3, 4)) == 3
    worker.mover.before_compute(Step(loads=[Load(0, 1, [7, 0])]))
    for layer, cache in worker.caches.items():
        assert torch.equal(cache[7], before[layer][1])
        assert torch.equal(cache[0], before[layer][6])
        assert not cache[1:7].any()


def test_blocks_may_change_as_soon_as_the_step_has_ended(worker: Worker) -> None:
    before = worker.caches["two"].clone()
    worker.mover.after_compute(Step(saves=[Save(hashes(1, 2), [2, 3])]))
    for cache in worker.caches.values():
        cache.fill_(1)
    worker.wait_for("stored", n=2)
    assert worker.fetch(0, hashes(1, 2)) == 2
    worker.mover.before_compute(Step(loads=[Load(0, 0, [0, 1])]))
    assert torch.equal(worker.caches["two"][:2], before[2:4])


def test_a_damaged_page_is_not_held_and_can_be_saved_again(worker: Worker, tmp_path: Path) -> None:
    worker.save([0, 1, 2], hashes(1, 2, 3))
    wanted = worker.caches["one"][1].contiguous().view(torch.uint8).numpy().tobytes()
    (file,) = [f for f in tmp_path.rglob("*") if f.is_file() and wanted in f.read_bytes()]
    with file.open("r+b") as segment:
        segment.seek(file.read_bytes().find(wanted) + 8)
        segment.write(b"?")
    assert worker.fetch(0, hashes(1, 2, 3)) == 1
    worker.save([1], hashes(2))
    worker.mover.before_compute(Step(drops=[0]))
    assert worker.fetch(1, hashes(1, 2, 3)) == 3


def test_saves_without_room_are_dropped_and_counted(tmp_path: Path) -> None:
    worker = Worker(tmp_path, max_pages=2)
    worker.save([0, 1, 2, 3, 4], hashes(1, 2, 3, 4, 5))
    assert worker.counts == {"stored": 2, "dropped": 3}
    worker.save([2, 3], hashes(3, 4))
    assert worker.counts["stored"] == 4
    assert worker.fetch(0, hashes(1, 2, 3, 4, 5)) == 2
    worker.mover.close()


def test_saves_without_memory_for_their_copies_are_dropped_and_leave_their_room(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError(), RuntimeError("out of memory")):
        with monkeypatch.context() as scarce:
            scarce.setattr(Blocks, "allocate", _raising(error))
            worker.save(list(range(N_BLOCKS)) * 8, hashes(*range(64)))  # all the room there is
    assert worker.counts == {"dropped": 128}
    worker.save([0, 1], hashes(1, 2))
    assert worker.counts == {"dropped": 128, "stored": 2}


def test_more_blocks_than_are_copied_at_once_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {layer: torch.randn((150, 2), generator=generator) for layer in LAYERS}
    before = {layer: cache.clone() for layer, cache in layers.items()}
    blocks = Blocks(LAYERS, layers, 150)
    host = blocks.copy_out(range(150))
    blocks.copy_in(host, 1, range(148, -1, -1))
    for layer, cache in layers.items():
        assert torch.equal(cache[:149], before[layer][1:].flip(0))
        assert torch.equal(cache[149], before[layer][149])


@pytest.mark.parametrize("order", ["BHNC", "BNHC"])
@pytest.mark.parametrize("n_parts", [1, 2])
def test_layouts_and_cut_blocks_are_copied_whole(order: str, n_parts: int) -> None:
    layers = caches(order, n_parts)
    before = {layer: cache.clone() for layer, cache in layers.items()}
    blocks = Blocks(LAYERS, layers, N_BLOCKS)
    assert blocks.page_nbytes == len(LAYERS) * N_HEADS * BLOCK * HEAD * 2
    host = blocks.copy_out([3, 4])
    blocks.copy_in(host, 0, [6, 7])
    for layer, cache in layers.items():
        assert torch.equal(cache[6 * n_parts :], before[layer][3 * n_parts : 5 * n_parts])
        assert torch.equal(cache[: 6 * n_parts], before[layer][: 6 * n_parts])


def test_a_layout_whose_blocks_are_not_one_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer 'one' is not in blocks: shape"):
        Blocks(LAYERS, caches("HBNC"), N_BLOCKS)
    layers = {layer: cache[:, :, :, :8] for layer, cache in caches().items()}
    with pytest.raises(ConfigError, match=r"not one run of bytes.*HiCacheTier"):
        Blocks(LAYERS, layers, N_BLOCKS)
