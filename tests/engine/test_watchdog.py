"""A request that makes no progress is named, and none that only waits for its turn."""

from __future__ import annotations

import threading
from typing import Any

from hicache_core.engine.watchdog import Watchdog
from tests.engine.test_engine import PATIENCE_S, Client, engine_of, request
from tests.engine.world import SteppedEngine, greedy, prompt_of, stepped_engine

LIMIT_S = 10.0


def stalled(it: SteppedEngine, after_s: float = 0.0) -> str:
    """What a watchdog says so many seconds, which are steps, from now on."""
    tasks = [*it.scheduler._waiting.values(), *it.scheduler._running.values()]
    dog = Watchdog(LIMIT_S, lambda: it.scheduler._clock() + after_s)
    return dog.look(tasks, it.scheduler.progressed_s)


def test_a_queue_behind_a_request_that_runs_is_no_alarm() -> None:
    with stepped_engine(max_running=1, chunk_tokens=3) as it:
        it.ask(prompt_of(30), greedy(40))
        it.ask(prompt_of(9, seed=1), greedy(1))
        while it.is_busy:
            assert not stalled(it)
            it.step()


def test_a_request_that_is_decoded_without_getting_tokens_is_named_though_others_get_some() -> None:
    with stepped_engine(max_running=2) as it:
        stuck = it.ask(prompt_of(9), greedy(40))
        it.ask(prompt_of(9, seed=1), greedy(40))
        it.step()
        decode = it.scheduler._decode
        it.scheduler._decode = lambda tasks: decode(tasks[1:])  # type: ignore[method-assign]
        for _ in range(int(LIMIT_S)):
            it.step()
            assert not stalled(it)
        it.step()
        it.step()
        said = stalled(it)
        assert f"request {stuck} has 1 of at most 40 new tokens" in said
        assert "no progress for 1" in said
        it.scheduler._decode = decode  # type: ignore[method-assign]
        it.step()
        assert not stalled(it)


def test_a_request_that_nobody_starts_is_named() -> None:
    with stepped_engine() as it:
        asked = it.ask(prompt_of(9))
        assert not stalled(it, LIMIT_S / 2)
        assert f"request {asked} waits with a prompt of 9 tokens" in stalled(it, 2 * LIMIT_S)
        it.run()


def test_the_status_of_an_engine_whose_thread_is_stuck_says_so() -> None:
    gate, client = threading.Event(), Client()
    with engine_of(stall_timeout_s=0.2) as engine:
        runner: Any = engine._scheduler._runner
        decode = runner.decode

        def stuck(batch: Any) -> Any:
            gate.wait(PATIENCE_S)
            return decode(batch)

        runner.decode = stuck
        engine.submit(request("r", prompt_of(9)), client)
        client.wait(1)
        while not engine.status().stalled:
            gate.wait(0.01)
        assert "request r has 1 of at most 8 new tokens" in engine.status().stalled
        gate.set()
        assert client.wait().finish_reason == "length"
        assert not engine.status().stalled
