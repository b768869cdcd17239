"""The thread of the engine, and the front that others call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.engine import Engine, EngineConfig
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Output, Request, SamplingParams
from hicache_core.errors import ConfigError, InvalidTokens, QueueFull, UseAfterClose
from hicache_core.types import CachedTokens
from tests.engine.world import cache_config, greedy, model_of, plain, prompt_of

PATIENCE_S = 60.0


class Client:
    """Collects the outputs of one request."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, output: Output) -> None:
        """Takes an output, on the engine's thread."""
        with self._changed:
            self.threads.add(threading.current_thread().name)
            self.outputs.append(output)
            self._changed.notify_all()

    def wait(self, n_outputs: int | None = None) -> Output:
        """The last output, once there are so many, or the request has ended."""

        def there() -> bool:
            ended = bool(self.outputs) and self.outputs[-1].finish_reason is not None
            return ended or (n_outputs is not None and len(self.outputs) >= n_outputs)

        with self._changed:
            assert self._changed.wait_for(there, PATIENCE_S)
            return self.outputs[-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The answer so far."""
        return tuple(token for output in self.outputs for token in output.new_tokens)


@contextmanager
def engine_of(
    loaded: LoadedModel | None = None, cache: HiCacheConfig | None = None, **config: Any
) -> Iterator[Engine]:
    """An open engine."""
    config = {"device_tokens": 512, **config}
    engine = Engine(loaded or model_of(), cache or cache_config(), EngineConfig(**config))
    engine.open()
    try:
        yield engine
    finally:
        engine.close(PATIENCE_S)


def request(request_id: str, prompt: list[int], sampling: SamplingParams | None = None) -> Request:
    """A request."""
    return Request(request_id, tuple(prompt), sampling or greedy())


def test_clients_of_many_threads_get_their_own_answers() -> None:
    prompts = [prompt_of(5 + n, seed=n) for n in range(6)]
    clients = [Client() for _ in prompts]
    with engine_of() as engine:

        def ask(n: int) -> None:
            engine.submit(request(f"r{n}", prompts[n]), clients[n])

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for prompt, client in zip(prompts, clients, strict=True):
            assert client.wait().finish_reason == "length"
            assert client.tokens == plain(model_of(), prompt, 8)
            assert client.threads == {"hicache-engine"}
        status = engine.status()
        assert (status.finished, status.running, status.waiting) == (6, 0, 0)
        assert status.n_slots == 512


def test_times_come_in_order() -> None:
    client = Client()
    with engine_of() as engine:
        engine.submit(request("r", prompt_of(9)), client)
        times = client.wait().times
    assert 0 < times.arrived <= times.first_scheduled <= times.first_token <= times.finished


def test_a_client_that_leaves_ends_its_request_and_no_other() -> None:
    left, stays = Client(), Client()
    with engine_of() as engine:
        engine.submit(request("left", prompt_of(9), greedy(400)), left)
        engine.submit(request("stays", prompt_of(10), greedy(20)), stays)
        left.wait(3)
        engine.abort("left")
        assert left.wait().finish_reason == "abort"
        assert stays.wait().finish_reason == "length"
        assert stays.tokens == plain(model_of(), prompt_of(10), 20)
        engine.abort("left")  # of one that has ended: nothing
        engine.abort("unknown")
        assert engine.status().aborted == 1


def test_more_than_max_waiting_are_refused() -> None:
    clients = [Client() for _ in range(3)]
    with engine_of(max_waiting=1, max_running=1) as engine:
        engine.submit(request("a", prompt_of(9), greedy(300)), clients[0])
        clients[0].wait(1)
        engine.submit(request("b", prompt_of(9)), clients[1])
        with pytest.raises(QueueFull, match="max_waiting is 1"):
            engine.submit(request("c", prompt_of(9)), clients[2])
        engine.abort("a")
        assert clients[1].wait().finish_reason == "length"
        engine.submit(request("c", prompt_of(9)), clients[2])
        assert clients[2].wait().finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([512], "vocabulary has 512"),
        ([-1], "token id -1"),
        (list(range(64)), "device pool has room for 64"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_in_words(
    prompt: list[int], message: str
) -> None:
    with engine_of(device_tokens=64) as engine, pytest.raises(InvalidTokens, match=message):
        engine.submit(request("r", prompt), Client())


def test_an_answer_ends_where_the_context_does() -> None:
    client = Client()
    with engine_of(context_length=20) as engine:
        engine.submit(request("r", prompt_of(15), greedy(100)), client)
        last = client.wait()
        assert (last.finish_reason, last.completion_tokens) == ("length", 5)
        with pytest.raises(InvalidTokens, match="context has room for 20"):
            engine.submit(request("s", prompt_of(20)), client)


def test_an_answer_ends_where_the_device_pool_does() -> None:
    client = Client()
    with engine_of(device_tokens=32) as engine:
        engine.submit(request("r", prompt_of(15), greedy(100)), client)
        assert client.wait().completion_tokens == 17
    assert client.tokens == plain(model_of(), prompt_of(15), 17)


def test_an_id_under_way_is_refused_and_free_again_afterwards() -> None:
    client = Client()
    with engine_of() as engine:
        engine.submit(request("r", prompt_of(9), greedy(200)), client)
        with pytest.raises(InvalidTokens, match="still running"):
            engine.submit(request("r", prompt_of(9)), Client())
        engine.abort("r")
        client.wait()
        again = Client()
        engine.submit(request("r", prompt_of(9)), again)
        assert again.wait().finish_reason == "length"


def test_sampling_parameters_out_of_range_are_refused() -> None:
    with engine_of() as engine, pytest.raises(ConfigError, match="top_p is 0"):
        engine.submit(request("r", prompt_of(9), SamplingParams(top_p=0)), Client())


def test_call_runs_on_the_engines_thread_and_hands_errors_to_its_caller() -> None:
    with engine_of() as engine:
        name = engine.call(lambda cache: threading.current_thread().name, PATIENCE_S)
        assert name == "hicache-engine"

        def fail(cache: object) -> None:
            raise ZeroDivisionError("as asked")

        with pytest.raises(ZeroDivisionError, match="as asked"):
            engine.call(fail, PATIENCE_S)
        assert engine.call(lambda cache: cache.reset(), PATIENCE_S)


def test_close_finishes_what_was_asked_and_stores_it(tmp_path: Path) -> None:
    config = cache_config(hicache_storage_backend="file", extra={"path": str(tmp_path)})
    first, second = Client(), Client()
    with engine_of(cache=config) as engine:
        engine.submit(request("r", prompt_of(21)), first)
    assert first.wait().finish_reason == "length"
    with engine_of(cache=config) as engine:
        engine.submit(request("r", prompt_of(21)), second)
        assert second.wait().cached == CachedTokens(storage=20)
    assert second.tokens == first.tokens


def test_close_without_time_aborts() -> None:
    client = Client()
    with engine_of() as engine:
        engine.submit(request("r", prompt_of(9), greedy(490)), client)
        client.wait(1)
        engine.close(0.0)
        assert client.wait().finish_reason == "abort"
        with pytest.raises(UseAfterClose, match="not open"):
            engine.submit(request("s", prompt_of(9)), Client())
        with pytest.raises(UseAfterClose):
            engine.call(lambda cache: None, PATIENCE_S)


def test_an_engine_that_was_never_opened_takes_nothing() -> None:
    engine = Engine(model_of(), cache_config(), EngineConfig(device_tokens=64))
    with pytest.raises(UseAfterClose):
        engine.submit(request("r", prompt_of(9)), Client())
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_leaves_nobody_waiting() -> None:
    """A bug of ours on the thread: clients get an error in words, and so do later ones."""
    broken = LoadedModel("llama", model_of("qwen3").model, None)
    client = Client()
    with engine_of(broken) as engine:

        def poll(*_: object, **__: object) -> None:
            raise ZeroDivisionError("no such luck")

        engine._cache.poll = poll  # type: ignore[method-assign,assignment]
        engine.submit(request("r", prompt_of(9)), client)
        last = client.wait()
        assert last.finish_reason == "error"
        assert "no such luck" in last.error
        engine._thread.join()  # type: ignore[union-attr]
        with pytest.raises(UseAfterClose, match="no such luck"):
            engine.submit(request("s", prompt_of(9)), Client())
        assert "no such luck" in engine.status().error


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_running", 0),
        ("chunk_tokens", 0),
        ("mem_fraction_static", 1.0),
        ("offload_stride", -1),
        ("stall_timeout_s", 0.0),
    ],
)
def test_settings_out_of_range_are_named(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        EngineConfig(**{setting: value})
