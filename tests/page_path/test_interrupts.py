"""A signal at any line of ours in a turn leaves no lock, no page and no setting behind."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import hicache_core
from hicache_core.integrations.transformers import CachedModel

from .mixed_models import mixed_model
from .test_transformers_model import PROMPT, World, assert_nothing_leaks, evict_units, plain
from .tiny_models import tiny_model

OURS = str(Path(hicache_core.__file__).parent)
ADAPTER = str(Path(OURS) / "integrations")


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest would take for the user's."""


def stop(number: int, frame: object) -> None:
    raise Stopped


class Lines:
    """Sends a signal at the ``n``-th time that a line of ours is reached; notes all lines."""

    def __init__(self, at: tuple[str, int, int] | None = None) -> None:
        self.seen: Counter[tuple[str, int]] = Counter()
        self._at = at

    def __enter__(self) -> Lines:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            self.seen[line] += 1
            if self._at == (*line, self.seen[line]):
                signal.raise_signal(signal.SIGUSR1)
        return self._trace


@pytest.fixture(autouse=True)
def _set_up() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, stop)
    yield
    signal.signal(signal.SIGUSR1, before)


def a_turn(cached: CachedModel, tokens: list[int]) -> None:
    """Finds what there is, computes the rest, and stores it: without a generate, to be quick."""
    with cached.turn(tokens) as turn, torch.no_grad():
        cached.model(
            torch.tensor([tokens[turn.past.get_seq_length() :]]), past_key_values=turn.past
        )
        turn.store(tokens)


def empty(cached: CachedModel) -> None:
    """Empties device and host; a question to storage that nobody waits for may still be out."""
    assert cached.cache.flush()
    deadline = time.monotonic() + 30
    while not cached.cache.reset():
        assert time.monotonic() < deadline, cached.cache.snapshot()
        cached.cache.wait(0.01)
        cached.cache.poll()
    for pool in (cached.device_pool, *cached.device_pool.groups):
        assert pool.allocator.n_free == pool.n_pages
    cached.cache.check_integrity()


def prepare(cached: CachedModel) -> None:
    """The device has a part of the prompt, the host more of it, and storage the rest."""
    empty(cached)
    a_turn(cached, PROMPT[:14])
    assert cached.cache.flush()
    cached.cache.evict(cached.device_pool.n_pages)
    evict_units(cached)
    a_turn(cached, PROMPT[:9])


def moments(seen: Counter[tuple[str, int]], every: int) -> Iterator[tuple[str, int, int]]:
    """Each line of the adapter, at its first and last time, and each ``every``-th line below it.

    The adapter has to take and give back in order; all that it calls is under its shield.
    """
    for line in [line for line in seen if line[0].startswith(ADAPTER)]:
        for nth in {1, seen[line]}:
            yield *line, nth
    for line in [line for line in seen if not line[0].startswith(ADAPTER)][::every]:
        yield *line, 1


@pytest.mark.parametrize("name", ["one layer", pytest.param("groups", marks=pytest.mark.full)])
def test_a_signal_at_any_line_leaves_nothing_taken(name: str) -> None:
    """In a model with full attention, and in one with a window and a state as well."""
    model = tiny_model("llama", num_hidden_layers=1) if name == "one layer" else mixed_model("lfm3")
    model.config.use_cache = False  # to be put aside, and back
    want = plain(model, PROMPT)
    with ExitStack() as stack:
        world = World(stack)
        writer = world.open(model)
        a_turn(writer, PROMPT)
        assert writer.cache.flush()
        cached = world.open(model, device_tokens=40)
        prepare(cached)
        with Lines() as lines:
            a_turn(cached, PROMPT)
        assert len(lines.seen) > 300
        n_stopped = 0
        for at in moments(lines.seen, 4 if name == "one layer" else 40):
            prepare(cached)
            try:
                with Lines(at):
                    a_turn(cached, PROMPT)
            except Stopped:
                n_stopped += 1
            cached.cache.check_integrity()
            a_turn(cached, PROMPT[:5])  # gives back what a signal at the very end has left
            assert model.config.use_cache is False
            empty(cached)
        assert n_stopped > 150
        answer = cached.generate(PROMPT, max_new_tokens=len(want), do_sample=False)
        assert answer.tokens == want
        assert_nothing_leaks(cached)
