"""Hits and decode steps of the adapter and the engine, beside transformers alone on the same model.

SmolLM2 where it is installed, else a small random model, as with ``--quick``. Both sides use one
thread of torch. They take turns, call by call, and the ratios are those inside one run.
"""

from __future__ import annotations

import contextlib
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.harness import Row
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.packaged import PACKAGED
from hicache_core.engine.request import Output, Request, SamplingParams
from hicache_core.errors import ConfigError
from hicache_core.integrations.transformers import CachedModel, CachedTokens

TTFT = "time to first token: {cached} tokens cached, {new} new ones, page of {page}, {model}"
DECODE = "decode step of one request after {n} tokens, {model}"
BATCH = "{n} requests at once, {prompt} tokens and {new} new ones each, {model}"
PAGE_SIZE = 64
TARGETS = {"device": 1.10, "host": 1.15, "storage": 1.25}
PATIENCE_S = 300.0
N_REQUESTS = 8
NO_TOKEN = 1 << 30
"""Ends no answer."""

Seconds = tuple[float, float]
"""By wall clock, and CPU time of the process."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        n_cached: tokens of a hit.
        histories: tokens before a decode step.
        n_steps: decode steps of a sample.
        n_prompt: tokens of each prompt of a batch.
        n_new: tokens of each answer of a batch.
        repeat: samples.
    """

    n_cached: int
    histories: tuple[int, ...]
    n_steps: int
    n_prompt: int
    n_new: int
    repeat: int


QUICK = Scale(256, (64, 128), 8, 32, 8, 2)
WHOLE = Scale(1984, (1024, 4096), 24, 128, 48, 7)


def rows(quick: bool) -> Iterator[Row]:
    """Time to first token by tier, decode steps, and requests at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scale = QUICK if quick else WHOLE
        loaded = _small() if quick else _smollm2()
        yield from _time_to_first_token(loaded, scale)
        for n_history in scale.histories:
            yield from _decode(loaded, n_history, scale)
        yield from _batch(loaded, scale)
    finally:
        torch.set_num_threads(before)


class Samples:
    """What was measured of each name, all of them in turn."""

    def __init__(self) -> None:
        """Has none yet."""
        self._of: dict[str, list[Seconds]] = {}

    def add(self, name: str, seconds: Seconds, *, counts: bool) -> None:
        """Adds a sample, unless it only warmed up."""
        if counts:
            self._of.setdefault(name, []).append(seconds)

    def rows(self, table: str, unit: str, base: str, targets: dict[str, str]) -> Iterator[Row]:
        """A row for each name, in milliseconds.

        Args:
            table: the title of their table.
            unit: of the samples.
            base: the name that the others are compared with.
            targets: in words, by name.
        """
        own_cpu = statistics.median(cpu for _, cpu in self._of[base])
        for name, samples in self._of.items():
            wall, cpu = ([1e3 * each for each in one] for one in zip(*samples, strict=True))
            note = (
                ""
                if name == base
                else f"by CPU time {statistics.median(cpu) / 1e3 / own_cpu:.2f} ×"
            )
            baseline = None if name == base else base
            yield Row(table, name, unit, wall, cpu, baseline, targets.get(name), note)


class Watch:
    """A stopwatch for wall and CPU time, read on any thread."""

    def __init__(self) -> None:
        """Starts."""
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        """Seconds since the start."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


class Marks(BaseStreamer):
    """Notes the time of each token that a ``generate`` hands out; the prompt comes first."""

    def __init__(self, watch: Watch) -> None:
        """Notes what ``watch`` says."""
        self._watch = watch
        self._n_puts = 0
        self.at: list[Seconds] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - only the time counts
        """Notes a token."""
        self._n_puts += 1
        if self._n_puts > 1:
            self.at.append(self._watch.read())

    def end(self) -> None:
        """Nothing is left to do."""


# Time to first token.


def _time_to_first_token(loaded: LoadedModel, scale: Scale) -> Iterator[Row]:
    """Hits by tier against one forward of the new tokens over a cache that has all others."""
    table = TTFT.format(cached=scale.n_cached, new=PAGE_SIZE, page=PAGE_SIZE, model=loaded.name)
    bare = "bare forward of the new tokens"
    prompt = _prompt(loaded.model, scale.n_cached + PAGE_SIZE, seed=1)
    samples = Samples()
    with _adapter(loaded, len(prompt)) as adapter, _engine(loaded, 2 * len(prompt)) as engine:
        filled = _filled(loaded.model, prompt[: scale.n_cached])
        servers: list[Adapter | EngineSide] = [adapter, engine]
        for server in servers:
            server.first_token(prompt)
        for n in range(scale.repeat + 1):  # the first round warms up
            for tier in TARGETS:
                samples.add(bare, _bare(loaded.model, prompt, filled), counts=n > 0)
                for server in servers:
                    server.leave_only(tier)
                    seconds, cached = server.first_token(prompt)
                    if cached != CachedTokens(**{tier: scale.n_cached}):
                        raise RuntimeError(f"expected a hit in the {tier} tier, got {cached}")
                    samples.add(f"{server.name}, {tier} hit", seconds, counts=n > 0)
    targets = {
        f"{server.name}, {tier} hit": f"at most {target:.2f}"
        for server in servers
        for tier, target in TARGETS.items()
    }
    yield from samples.rows(table, "ms", bare, targets)


@torch.inference_mode()
def _filled(model: Any, tokens: Sequence[int]) -> Any:
    """transformers' own cache, with the KV of ``tokens``."""
    past = transformers.DynamicCache(config=model.config)
    model(torch.tensor([list(tokens)]), past_key_values=past, logits_to_keep=1)
    return past


@torch.inference_mode()
def _bare(model: Any, prompt: Sequence[int], past: Any) -> Seconds:
    """One forward of what ``past`` lacks of a prompt; ``past`` is as before afterwards."""
    n_past = past.get_seq_length()
    watch = Watch()
    logits = model(
        torch.tensor([list(prompt[n_past:])]), past_key_values=past, logits_to_keep=1
    ).logits
    int(logits[0, -1].argmax())
    seconds = watch.read()
    past.crop(n_past - len(prompt))
    return seconds


# Decode steps.


def _decode(loaded: LoadedModel, n_history: int, scale: Scale) -> Iterator[Row]:
    """Steps of ``generate`` with transformers' own cache, of the adapter and of the engine."""
    table = DECODE.format(n=f"{n_history:,}", model=loaded.name)
    own = "transformers' generate"
    prompt = _prompt(loaded.model, n_history, seed=2)
    samples = Samples()
    n_tokens = len(prompt) + scale.n_steps
    with _adapter(loaded, n_tokens) as adapter, _engine(loaded, 2 * n_tokens) as engine:
        filled = _filled(loaded.model, prompt[:-1])
        expected = _steps_of_generate(loaded.model, prompt, scale.n_steps, filled)[1]
        for n in range(scale.repeat + 1):
            steps, _ = _steps_of_generate(loaded.model, prompt, scale.n_steps, filled)
            samples.add(own, steps, counts=n > 0)
            for server in (adapter, engine):
                steps, tokens = server.steps(prompt, scale.n_steps)
                if tokens != expected:
                    raise RuntimeError(f"{server.name} answered {tokens}, generate {expected}")
                samples.add(server.name, steps, counts=n > 0)
    targets = dict.fromkeys((adapter.name, engine.name), "at most 1.10")
    yield from samples.rows(table, "ms", own, targets)


def _steps_of_generate(
    model: Any, prompt: Sequence[int], n_steps: int, past: Any
) -> tuple[Seconds, list[int]]:
    """A step of ``model.generate`` over a cache that has all of the prompt but its last token."""
    n_past = past.get_seq_length()
    marks = Marks(Watch())
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=past,
        streamer=marks,
        **_greedy(n_steps),
    )
    past.crop(n_past - past.get_seq_length())
    return _step_of(marks.at), output[0, len(prompt) :].tolist()


def _step_of(marks: Sequence[Seconds]) -> Seconds:
    """A step's wall and CPU time: the mean, without the first token, which ends the prompt."""
    wall, cpu = (marks[-1][at] - marks[0][at] for at in (0, 1))
    return wall / (len(marks) - 1), cpu / (len(marks) - 1)


# Requests at once.


def _batch(loaded: LoadedModel, scale: Scale) -> Iterator[Row]:
    """Tokens a CPU second of the engine and of transformers' continuous batching."""
    table = BATCH.format(n=N_REQUESTS, prompt=scale.n_prompt, new=scale.n_new, model=loaded.name)
    own = "transformers' generate_batch"
    rates: dict[str, list[Seconds]] = {own: [], EngineSide.name: []}
    n_tokens = N_REQUESTS * (scale.n_prompt + scale.n_new)
    with contextlib.ExitStack() as undo:
        engine = undo.enter_context(_engine(loaded, 2 * n_tokens))
        peer = undo.enter_context(_continuous(loaded.model, 2 * n_tokens, scale))
        for n in range(scale.repeat + 1):
            prompts = [
                _prompt(loaded.model, scale.n_prompt, seed=100 * n + at) for at in range(N_REQUESTS)
            ]
            answers = {}
            for name, answer in ((own, peer), (EngineSide.name, engine.answer_all)):
                watch = Watch()
                answers[name] = answer(prompts, scale.n_new)
                wall_s, cpu_s = watch.read()
                if n > 0:  # the first round warms up
                    n_new = N_REQUESTS * scale.n_new
                    rates[name].append((n_new / wall_s, n_new / cpu_s))
            if answers[own] != answers[EngineSide.name]:
                raise RuntimeError(f"the answers differ: {answers}")
    own_cpu = statistics.median(cpu for _, cpu in rates[own])
    for name, samples in rates.items():
        wall, cpu = ([*one] for one in zip(*samples, strict=True))
        its = {} if name == own else {"baseline": own, "target": "at least 1.0 by CPU time"}
        note = "" if name == own else f"by CPU time {statistics.median(cpu) / own_cpu:.2f} ×"
        yield Row(table, name, "tokens/s", wall, cpu, note=note, **its)


Answers = Callable[[list[list[int]], int], list[list[int]]]


@contextlib.contextmanager
def _continuous(model: Any, n_tokens: int, scale: Scale) -> Iterator[Answers]:
    """transformers' continuous batching, as ``generate_batch`` runs it, kept open between calls.

    Its memory has room for ``n_tokens``; its attention is the paged variant of the model's own.
    """
    before = model.config._attn_implementation
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=-(-n_tokens // PAGE_SIZE),
        max_batch_tokens=512,
        allow_block_sharing=False,
        use_cuda_graph=False,
    )
    generation = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=NO_TOKEN, pad_token_id=0, do_sample=False, max_new_tokens=scale.n_new
    )
    try:
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, timeout=10
        ) as manager:

            def answer(prompts: list[list[int]], n_new: int) -> list[list[int]]:
                ids = [manager.add_request(prompt, max_new_tokens=n_new) for prompt in prompts]
                found: dict[str, list[int]] = {}
                while len(found) < len(ids):
                    result = manager.get_result(timeout=PATIENCE_S)
                    if result is not None and result.is_finished():
                        found[result.request_id] = result.generated_tokens
                return [found[request_id] for request_id in ids]

            yield answer
    finally:
        model.set_attn_implementation(before)


# The two sides of HiCache.


class Adapter:
    """A ``CachedModel``."""

    name = "adapter"

    def __init__(self, cached: CachedModel) -> None:
        """Uses an open one."""
        self._cached = cached

    def first_token(self, prompt: Sequence[int]) -> tuple[Seconds, CachedTokens]:
        """Seconds to the first token of a ``generate``, and what was cached."""
        marks = Marks(Watch())
        answer = self._cached.generate(list(prompt), streamer=marks, **_greedy(1))
        return marks.at[0], answer.cached

    def steps(self, prompt: Sequence[int], n_steps: int) -> tuple[Seconds, list[int]]:
        """Seconds of a decode step, and the answer."""
        marks = Marks(Watch())
        answer = self._cached.generate(list(prompt), streamer=marks, **_greedy(n_steps))
        return _step_of(marks.at), answer.tokens

    def leave_only(self, tier: str) -> None:
        """Empties the tiers above ``tier``."""
        _leave_only(self._cached.cache, tier)


class EngineSide:
    """An ``Engine``."""

    name = "engine"

    def __init__(self, engine: Engine) -> None:
        """Uses an open one."""
        self._engine = engine
        self._n_asked = 0

    def first_token(self, prompt: Sequence[int]) -> tuple[Seconds, CachedTokens]:
        """Seconds to the first token of a request, and what was cached."""
        marks, outputs = self._ask(prompt, 1)
        return marks[0], outputs[-1].cached

    def steps(self, prompt: Sequence[int], n_steps: int) -> tuple[Seconds, list[int]]:
        """Seconds of a decode step, and the answer."""
        marks, outputs = self._ask(prompt, n_steps)
        return _step_of(marks), [token for each in outputs for token in each.new_tokens]

    def answer_all(self, prompts: list[list[int]], n_new: int) -> list[list[int]]:
        """Answers requests that come together."""
        found: queue.SimpleQueue[Output] = queue.SimpleQueue()
        ids = [self._submit(prompt, n_new, found.put) for prompt in prompts]
        answers: dict[str, list[int]] = {request_id: [] for request_id in ids}
        n_left = len(ids)
        while n_left:
            output = found.get(timeout=PATIENCE_S)
            answers[output.request_id] += output.new_tokens
            n_left -= output.finish_reason is not None
        return [answers[request_id] for request_id in ids]

    def leave_only(self, tier: str) -> None:
        """Empties the tiers above ``tier``."""
        self._engine.call(lambda cache: _leave_only(cache, tier), PATIENCE_S)

    def _ask(self, prompt: Sequence[int], n_new: int) -> tuple[list[Seconds], list[Output]]:
        marks: list[Seconds] = []
        outputs: list[Output] = []
        ended = threading.Event()
        watch = Watch()

        def take(output: Output) -> None:
            marks.append(watch.read())
            outputs.append(output)
            if output.finish_reason is not None:
                ended.set()

        self._submit(prompt, n_new, take)
        if not ended.wait(PATIENCE_S):
            raise RuntimeError(f"no answer in {PATIENCE_S:.0f} s")
        if outputs[-1].error:
            raise RuntimeError(outputs[-1].error)
        return marks, outputs

    def _submit(
        self, prompt: Sequence[int], n_new: int, on_output: Callable[[Output], None]
    ) -> str:
        self._n_asked += 1
        sampling = SamplingParams(max_new_tokens=n_new, temperature=0.0, ignore_eos=True)
        request_id = f"r{self._n_asked}"
        self._engine.submit(Request(request_id, tuple(prompt), sampling), on_output)
        return request_id


def _leave_only(cache: Any, tier: str) -> None:
    """Empties the tiers above ``tier``, once everything has been written."""
    if not cache.flush(PATIENCE_S):
        raise RuntimeError(f"not everything was written in {PATIENCE_S:.0f} s")
    if tier == "host":
        while cache.evict(1 << 20):
            pass
    deadline = time.monotonic() + PATIENCE_S
    while tier == "storage" and not cache.reset():
        if time.monotonic() > deadline:
            raise RuntimeError("something is still in use")
        cache.wait(0.01)


@contextlib.contextmanager
def _adapter(loaded: LoadedModel, n_tokens: int) -> Iterator[Adapter]:
    """A ``CachedModel`` with room for two prompts of ``n_tokens``."""
    with (
        _cache_config() as config,
        CachedModel.open(loaded.model, config, device_tokens=2 * n_tokens + PAGE_SIZE) as cached,
    ):
        yield Adapter(cached)


@contextlib.contextmanager
def _engine(loaded: LoadedModel, n_tokens: int) -> Iterator[EngineSide]:
    """An engine with room for ``n_tokens``, which makes no text."""
    settings = EngineConfig(max_running=N_REQUESTS, device_tokens=n_tokens + PAGE_SIZE)
    with _cache_config() as config:
        engine = Engine(LoadedModel(loaded.name, loaded.model, None), config, settings)
        engine.open()
        try:
            yield EngineSide(engine)
        finally:
            engine.close()


@contextlib.contextmanager
def _cache_config() -> Iterator[HiCacheConfig]:
    """Settings with a file store of its own, from which a prompt awaits everything."""
    with tempfile.TemporaryDirectory(prefix="hicache-bench-") as directory:
        yield HiCacheConfig(
            page_size=PAGE_SIZE,
            hicache_storage_backend="file",
            hicache_storage_prefetch_policy="wait_complete",
            hicache_storage_backend_extra_config={"path": directory},
        )


def _greedy(n_new: int) -> dict[str, Any]:
    """Arguments of ``generate`` for an answer of exactly ``n_new`` tokens."""
    return {
        "max_new_tokens": n_new,
        "do_sample": False,
        "eos_token_id": NO_TOKEN,
        "pad_token_id": 0,
    }


def _prompt(model: Any, n_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    n_ids: int = model.config.vocab_size
    ids: list[int] = torch.randint(10, n_ids, (n_tokens,), generator=generator).tolist()
    return ids


def _smollm2() -> LoadedModel:
    try:
        loaded = PACKAGED["smollm2"](torch.float32)
    except ConfigError:
        return _small()
    return LoadedModel("SmolLM2-135M float32", loaded.model, None)


def _small() -> LoadedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return LoadedModel("random Llama of 4 layers", model.eval(), None)
