"""What fails for one request ends that request with an error, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hicache_core.engine.runner import Past
from hicache_core.errors import IntegrityError, RankLost
from tests.engine.test_engine import Client, engine_of, request
from tests.engine.world import (
    SteppedEngine,
    greedy,
    model_of,
    plain,
    prompt_of,
    stepped_engine,
    with_text,
)

POISON = 7
"""A token on which something fails, wherever it stands in a prompt."""

PROMPT = [token for token in prompt_of(30) if token != POISON][:21]
BAD = [*PROMPT[:10], POISON, *PROMPT[10:]]
OTHER = [token for token in prompt_of(30, seed=1) if token != POISON][:13]

Patch = pytest.MonkeyPatch


class NoLuckError(Exception):
    """Fails a request in a test."""


def prefill_fails(it: SteppedEngine, patch: Patch) -> None:
    prefill = it.scheduler._runner.prefill

    def failing(tokens: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        if POISON in tokens:
            raise NoLuckError("a token that the model cannot compute")
        return prefill(tokens, *args, **kwargs)

    patch.setattr(it.scheduler._runner, "prefill", failing)


def a_layer_of_prefill_fails(it: SteppedEngine, patch: Patch) -> None:
    """In the middle: rows of the first layers are written by then."""
    layer = it.loaded.model.model.layers[1]
    forward = layer.forward
    tokens: list[int] = []
    prefill = it.scheduler._runner.prefill

    def remembering(ids: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens[:] = ids
        try:
            return prefill(ids, *args, **kwargs)
        finally:
            tokens.clear()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if POISON in tokens:
            raise NoLuckError("no such row")
        return forward(*args, **kwargs)

    patch.setattr(it.scheduler._runner, "prefill", remembering)
    patch.setattr(layer, "forward", failing)


def decode_fails(it: SteppedEngine, patch: Patch) -> None:
    """Of the batch, and alone; which of them it was nobody says."""
    decode = it.scheduler._runner.decode

    def failing(batch: Sequence[Past]) -> torch.Tensor:
        if any(past.n_tokens >= len(BAD) for past in batch):
            raise NoLuckError("a shape that does not fit")
        return decode(batch)

    patch.setattr(it.scheduler._runner, "decode", failing)


def of_the_bad(it: SteppedEngine) -> Any:
    """The task of the request for ``BAD``."""
    everybody = [*it.scheduler._waiting.values(), *it.scheduler._running.values()]
    return next(task for task in everybody if POISON in task.tokens)


def sampler_fails(it: SteppedEngine, patch: Patch) -> None:
    def choose(*_: object) -> int:
        raise NoLuckError("nothing to choose from")

    patch.setattr(of_the_bad(it).sampler, "choose", choose)


def text_fails(it: SteppedEngine, patch: Patch) -> None:
    def push(token: int, *, may_stop: bool) -> tuple[str, bool]:
        raise NoLuckError("no such character")

    patch.setattr(of_the_bad(it)._stream, "push", push)


def store_fails(it: SteppedEngine, patch: Patch) -> None:
    def store(tokens: Sequence[int], *, keep_end: bool = True) -> None:
        raise NoLuckError("no memory for a node")

    patch.setattr(of_the_bad(it).table, "store", store)


def admission_fails(it: SteppedEngine, patch: Patch) -> None:
    load_back = it.cache.load_back

    def failing(match: Any) -> Any:
        if POISON in it.scheduler._first_ready().tokens:  # type: ignore[union-attr]
            raise NoLuckError("no memory for a list of pages")
        return load_back(match)

    patch.setattr(it.cache, "load_back", failing)


FAULTS = [
    prefill_fails,
    a_layer_of_prefill_fails,
    decode_fails,
    sampler_fails,
    text_fails,
    store_fails,
    admission_fails,
]


@pytest.mark.parametrize("chunk_tokens", [5, 64])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_fails_for_one_request_ends_that_one_alone(
    fault: Callable[[SteppedEngine, Patch], None], chunk_tokens: int, monkeypatch: Patch
) -> None:
    with stepped_engine(with_text(model_of()), chunk_tokens=chunk_tokens, max_running=3) as it:
        first = it.ask(OTHER[:9], greedy(6))
        it.step()
        bad = it.ask(BAD, greedy(6))
        last = it.ask(OTHER, greedy(6))
        fault(it, monkeypatch)
        it.run()
        assert it.last(bad).finish_reason == "error"
        assert "NoLuckError" in it.last(bad).error
        assert it.tokens(first) == plain(it.loaded, OTHER[:9], 6)
        assert it.tokens(last) == plain(it.loaded, OTHER, 6)
        assert it.scheduler.n_used_pages == 0
        assert it.scheduler.tally.failed == 1
        monkeypatch.undo()
        again = it.ask(BAD, greedy(6))
        it.run()
        assert it.tokens(again) == plain(it.loaded, BAD, 6), "it left nothing wrong behind"


def test_a_batch_that_fails_as_a_whole_is_computed_one_by_one(monkeypatch: Patch) -> None:
    """As of models that cannot mask: each of them is right alone."""
    with stepped_engine(max_running=3) as it:
        decode = it.scheduler._runner.decode

        def failing(batch: Sequence[Past]) -> torch.Tensor:
            if len({past.n_tokens for past in batch}) > 1:
                raise NoLuckError("these lengths do not fit together")
            return decode(batch)

        monkeypatch.setattr(it.scheduler._runner, "decode", failing)
        asked = [it.ask(prompt, greedy(6)) for prompt in (PROMPT, OTHER, OTHER[:5])]
        it.run()
        for name, prompt in zip(asked, (PROMPT, OTHER, OTHER[:5]), strict=True):
            assert it.tokens(name) == plain(it.loaded, prompt, 6)


def test_a_copy_that_cannot_begin_is_computed_again(monkeypatch: Patch) -> None:
    with stepped_engine() as it:
        it.ask(PROMPT, greedy(1))
        it.run()
        it.cache.flush()
        it.cache.evict(it.pool.n_pages)
        transfer: Any = it.cache.parts.transfer

        def prepare(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(transfer, "_prepare", prepare)
        asked = it.ask(PROMPT)
        it.run()
        assert it.tokens(asked) == plain(it.loaded, PROMPT, 8)
        assert it.scheduler.tally.restarted > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [IntegrityError("lost"), RankLost("gone")])
def test_what_is_no_requests_error_ends_the_engine(error: Exception, monkeypatch: Patch) -> None:
    client = Client()
    with engine_of() as engine:

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(engine._scheduler, "_admit", fail)
        engine.submit(request("r", PROMPT), client)
        assert client.wait().finish_reason == "error"
        engine.join()
        assert str(error) in engine.status().error


def test_a_client_that_raises_is_heard_no_more_and_others_are() -> None:
    def raising(_: object) -> None:
        raise NoLuckError("nobody is here")

    client = Client()
    with engine_of() as engine:
        engine.submit(request("gone", PROMPT, greedy(400)), raising)
        engine.submit(request("r", OTHER), client)
        client.wait()
        assert client.tokens == plain(model_of(), OTHER, 8)
        status = engine.status()
        assert (status.error, status.running, status.aborted) == ("", 0, 1)
