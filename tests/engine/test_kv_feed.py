"""A listener hears of each row of a prompt once, and its pages stay while it reads them."""

from __future__ import annotations

from array import array
from collections import defaultdict

import pytest
import torch

from hicache_core.engine.request import Request
from tests.engine.test_groups import loaded_model
from tests.engine.world import SteppedEngine, cache_config, greedy, plain, prompt_of, stepped_engine


class Recorder:
    """Listens to requests whose id begins with ``w``; copies rows when it is told of them."""

    def __init__(self, it: SteppedEngine) -> None:
        self.pool = it.pool
        self.rows: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        self.keys: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        self.pages: dict[str, list[int]] = {}
        self.ends: dict[str, list[bool]] = defaultdict(list)
        self.held: set[str] = set()

    def wants(self, request: Request) -> bool:
        """As asked; an attempt before is forgotten."""
        for at in [key for key in self.rows if key[0] == request.request_id]:
            del self.rows[at], self.keys[at]
        return request.request_id.startswith("w")

    def computed(
        self, request: Request, pages: array[int], layer: int, start: int, stop: int
    ) -> None:
        """Takes the keys of the rows."""
        at = (request.request_id, layer)
        self.rows[at].append((start, stop))
        slots = [pages[n // 4] * 4 + n % 4 for n in range(start, stop)]
        self.keys[at].append(self.pool.buffers[0][layer].flatten(0, 1)[slots].clone())
        self.pages[request.request_id] = list(pages)

    def ended(self, request: Request, *, complete: bool) -> None:
        """Notes it."""
        self.ends[request.request_id].append(complete)

    def holds(self, request_id: str) -> bool:
        """As the test says."""
        return request_id in self.held

    def step(self) -> None:
        """Nothing is to be done."""


def listening(it: SteppedEngine) -> Recorder:
    """A recorder that listens."""
    recorder = Recorder(it)
    it.scheduler.feed.listener = recorder
    return recorder


@pytest.mark.parametrize("chunk_tokens", [3, 64])
def test_each_row_is_told_once_for_each_layer_when_it_is_final(chunk_tokens: int) -> None:
    prompt = prompt_of(22)
    with stepped_engine(chunk_tokens=chunk_tokens) as it:
        it.ask(prompt[:13], greedy(1))
        it.run()
        recorder = listening(it)
        asked = it.ask(prompt, greedy(5), request_id="w")
        it.run_until(lambda: len(it.tokens(asked)) == 2)
        pages = recorder.pages["w"]
        slots = [pages[n // 4] * 4 + n % 4 for n in range(22)]
        for layer in range(3):
            rows = recorder.rows["w", layer]
            assert [start for start, _ in rows] == [0] + [stop for _, stop in rows[:-1]]
            assert rows[-1][1] == 22
            final = it.pool.buffers[0][layer].flatten(0, 1)[slots]
            assert torch.equal(torch.cat(recorder.keys["w", layer]), final)
        it.run()
        assert recorder.ends["w"] == [True]
        assert it.tokens(asked) == plain(it.loaded, prompt, 5)


def test_others_are_not_told() -> None:
    with stepped_engine() as it:
        recorder = listening(it)
        it.ask(prompt_of(9), request_id="other")
        it.run()
        assert not recorder.rows
        assert not recorder.ends


def test_pages_stay_while_the_listener_reads_them() -> None:
    with stepped_engine(n_pages=8) as it:
        recorder = listening(it)
        recorder.held.add("w")
        it.ask(prompt_of(22), greedy(1), request_id="w")
        other = it.ask(prompt_of(25, seed=1), greedy(1))
        for _ in range(20):
            it.step()
        assert it.last("w").finish_reason == "length"
        assert it.scheduler.n_used_pages == 6
        assert not it.outputs[other]
        recorder.held.clear()
        it.run()
        assert it.tokens(other) == plain(it.loaded, prompt_of(25, seed=1), 1)
        assert it.scheduler.n_used_pages == 0


def test_a_client_that_leaves_ends_what_the_listener_heard() -> None:
    with stepped_engine(chunk_tokens=5) as it:
        recorder = listening(it)
        it.ask(prompt_of(22), greedy(1), request_id="w")
        it.step()
        it.scheduler.abort("w")
        assert recorder.ends["w"] == [False]


class GroupRecorder(Recorder):
    """Hears of groups, too, and remembers where it was told that rows are, and what they were."""

    def __init__(self, it: SteppedEngine) -> None:
        super().__init__(it)
        self.parts: dict[tuple[int | None, int], list[tuple[int, int]]] = defaultdict(list)
        self.seen: list[tuple[torch.Tensor, list[int], torch.Tensor]] = []

    def computed(
        self,
        request: Request,
        pages: array[int],
        layer: int,
        start: int,
        stop: int,
        group: int | None = None,
    ) -> None:
        """Copies the rows of every component that the layer has."""
        self.parts[group, layer].append((start, stop))
        pool = self.pool if group is None else self.pool.groups[group]
        size = pool.page_size
        slots = [pages[n // size] * size + n % size for n in range(start, stop)]
        for component, at in pool.spec.components_in(layer):
            rows = pool.buffers[component][at].flatten(0, 1)
            self.seen.append((rows, slots, rows[slots].clone()))


@pytest.mark.parametrize("has_twin", [False, True])
def test_windows_and_states_are_told_and_stay_while_the_listener_reads_them(has_twin: bool) -> None:
    """Also where another request has the same tokens in other pages, which the tree takes."""
    n_prompt, window = 42, 10
    tokens = [token % 492 + 12 for token in prompt_of(n_prompt)]
    cache = cache_config(state_snapshot_interval=16)
    with stepped_engine(loaded_model("lfm3"), cache=cache, chunk_tokens=20, max_running=2) as it:
        recorder = GroupRecorder(it)
        it.scheduler.feed.listener = recorder
        recorder.held.add("w")
        it.ask(tokens, greedy(1), request_id="w")
        if has_twin:
            it.step()  # a forward of its prompt ends with an interval, and leaves room for the twin
            it.ask(tokens, greedy(1), request_id="twin", priority=1)
        it.run_until(lambda: all(bool(outputs) for outputs in it.outputs.values()))
        assert recorder.ends["w"] == [True]
        spec = it.pool.spec
        first = (40 - window + 1) // 4 * 4
        for layer in range(spec.num_layers):
            for group, start, stop in [(None, 0, n_prompt), (0, first, n_prompt), (1, 0, 1)]:
                rows = recorder.parts[group, layer]
                if group is not None and not spec.groups[group].spec.components_in(layer):
                    assert not rows
                    continue
                assert [low for low, _ in rows] == [start] + [high for _, high in rows[:-1]]
                assert rows[-1][1] == stop
        for group, pool in enumerate(it.pool.groups):  # whatever can leave is overwritten
            free = it.cache.allocate_units(group, pool.allocator.n_free)
            for layers in pool.buffers:
                for buffer in layers:
                    buffer[list(free)] = 7.0
            it.cache.free_units(group, free)
        for rows, slots, before in recorder.seen:
            assert torch.equal(rows[slots], before)
        held = [table.units.has_spares for table in it.scheduler.feed.tables()]
        recorder.held.clear()
        it.run()
        assert held == [has_twin]
        for group, pool in enumerate(it.pool.groups):
            assert len(it.cache.allocate_units(group, pool.n_pages)) == pool.n_pages


def test_with_groups_a_request_that_goes_on_after_its_prompt_is_not_complete() -> None:
    """Its state and its window are those of the answer by then."""
    with stepped_engine(loaded_model("mamba2")) as it:
        recorder = GroupRecorder(it)
        it.scheduler.feed.listener = recorder
        it.ask(prompt_of(9), greedy(1), request_id="w1")
        it.ask(prompt_of(9), greedy(2), request_id="w2")
        it.run()
        assert (recorder.ends["w1"], recorder.ends["w2"]) == ([True], [False])
