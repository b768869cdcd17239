"""Models with windows and with recurrent states: bytes, hits of a long conversation, and TTFT.

Gemma 3 270M and SmolLM2 where they are installed, else small random models of the same kinds, as
with ``--quick``. Every comparison is made inside one run.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.harness import InTurn, Row
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.generation import generate_greedy
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.packaged import PACKAGED
from hicache_core.errors import ConfigError, SpecError
from hicache_core.integrations.transformers import CachedModel, CachedTokens

BYTES = "bytes a cached token (one prompt of {n} tokens, float32)"
HITS = "hit tokens of a conversation of {n} turns, window {window}, the same room"
TTFT = "time to first token of {n} tokens: {model}, float32, file storage"
COMPUTED = "computed"
TIERS = ("device", "host", "storage")
WINDOW = 64
N_TURNS = 20
PATIENCE_S = 120.0


def rows(quick: bool) -> Iterator[Row]:
    """Bytes a cached token, hit tokens of a conversation, and time to first token by tier."""
    n_tokens = 500 if quick else 2000
    gemma = _gemma(WINDOW) if quick else _packaged("gemma3-270m") or _gemma(512)
    smollm2 = _llama() if quick else _packaged("smollm2") or _llama()
    for loaded in (gemma, _qwen3_next(), smollm2):
        yield from _bytes_a_token(loaded, n_tokens)
    yield from _hits_of_a_conversation()
    yield from _time_to_first_token(gemma, n_tokens, repeat=2 if quick else 3)


# Bytes.


def _bytes_a_token(loaded: LoadedModel, n_tokens: int) -> Iterator[Row]:
    """What each tier holds after one prompt, beside what transformers' own cache holds."""
    table, own = BYTES.format(n=n_tokens), f"{loaded.name}: transformers' own cache"
    prompt = _prompt(loaded.model, n_tokens, seed=1)
    with torch.inference_mode():
        output = loaded.model(
            torch.tensor([prompt]),
            past_key_values=transformers.DynamicCache(config=loaded.model.config),
            logits_to_keep=1,
        )
    yield Row(table, own, "B", [sum(_tensor_nbytes(output.past_key_values.layers)) / n_tokens])
    try:
        with _opened(loaded.model, n_tokens) as cached:
            cached.generate(prompt, max_new_tokens=1, do_sample=False)
            _flush(cached)
            n_cached = n_tokens // cached.cache.page_size * cached.cache.page_size
            held = _held_nbytes(cached)
    except SpecError as error:
        yield Row(table, f"{loaded.name}: cached", "B", [0.0], note=f"refused: {error}")
        return
    for tier, nbytes in held.items():
        yield Row(table, f"{loaded.name}: {tier}", "B", [nbytes / n_cached], baseline=own)


def _tensor_nbytes(value: Any) -> Iterator[int]:
    """Bytes of every tensor below ``value``."""
    if isinstance(value, torch.Tensor):
        yield value.nbytes
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensor_nbytes(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensor_nbytes(one)
    elif type(value).__module__ == transformers.cache_utils.__name__:  # a layer
        yield from _tensor_nbytes(vars(value))


def _held_nbytes(cached: CachedModel) -> dict[str, int]:
    """Bytes by tier: pages and units that somebody owns, and what the store has taken."""
    device = [cached.device_pool, *cached.device_pool.groups]
    parts = cached.cache.parts
    host = [parts.host, *(group.host for group in parts.groups)]
    return {
        "device": sum(map(_used_nbytes, device)),
        "host": sum(map(_used_nbytes, host)),
        "storage": cached.cache.snapshot().stored_nbytes,
    }


def _used_nbytes(pool: Any) -> int:
    n_used = pool.n_pages - pool.allocator.n_free
    nbytes: int = n_used * pool.spec.page_nbytes(pool.page_size)
    return nbytes


# Hits.


def _hits_of_a_conversation() -> Iterator[Row]:
    """Twenty turns, each of which asks with everything that was said before it."""
    table = HITS.format(n=N_TURNS, window=WINDOW)
    for name, loaded in {
        "full attention": _gemma(None),
        "windows in five of six layers": _gemma(WINDOW),
    }.items():
        n_device, n_host, n_prompt = _talk(loaded.model)
        note = f"of {n_prompt} prompt tokens; {n_device} from the device, {n_host} from the host"
        base = None if name == "full attention" else "full attention"
        yield Row(table, name, "tokens", [float(n_device + n_host)], baseline=base, note=note)


def _talk(model: Any) -> tuple[int, int, int]:
    """Hit tokens from device and host, and prompt tokens; the device is emptied every 5 turns."""
    n_device = n_host = n_prompt = 0
    with _opened(model, 2048) as cached:
        tokens = _prompt(model, 100, seed=2)
        for turn in range(N_TURNS):
            if turn % 5 == 4:
                _empty_device(cached)
            tokens += _prompt(model, 40, seed=3 + turn)
            n_prompt += len(tokens)
            answer = cached.generate(tokens, max_new_tokens=12, do_sample=False)
            n_device += answer.cached.device
            n_host += answer.cached.host
            tokens += answer.tokens
            _flush(cached)
    return n_device, n_host, n_prompt


# Time to first token.


def _time_to_first_token(loaded: LoadedModel, n_tokens: int, repeat: int) -> Iterator[Row]:
    """A prompt computed, and found in each tier, in turn."""
    prompt = _prompt(loaded.model, n_tokens, seed=99)
    table = TTFT.format(n=n_tokens, model=loaded.name)
    samples = InTurn()
    with _opened(loaded.model, n_tokens) as cached:
        cached.generate(prompt, max_new_tokens=1, do_sample=False)
        for n in range(repeat + 1):  # the first round warms up
            _flush(cached)
            samples.call(
                COMPUTED, "ttft", partial(generate_greedy, loaded.model, prompt, 1), counts=n > 0
            )
            for tier in TIERS:
                if tier == "host":
                    _empty_device(cached)
                elif tier == "storage":
                    _forget(cached)
                samples.call(tier, "ttft", partial(_hit, cached, prompt, tier), counts=n > 0)
                _flush(cached)
    for name in (COMPUTED, *TIERS):
        yield samples.row(table, name, "ttft", COMPUTED, None)


def _hit(cached: CachedModel, prompt: Sequence[int], tier: str) -> None:
    """The first token of a prompt whose pages are all in one tier."""
    with cached.turn(list(prompt)) as turn:
        generate_greedy(cached.model, prompt, 1, past=turn.past)
        known = (len(prompt) - 1) // cached.cache.page_size * cached.cache.page_size
        if turn.cached != CachedTokens(**{tier: known}):
            raise RuntimeError(f"expected {known} tokens from the {tier} tier, got {turn.cached}")


def _flush(cached: CachedModel) -> None:
    if not cached.cache.flush(PATIENCE_S):
        raise RuntimeError(f"not everything was written in {PATIENCE_S:.0f} s")


def _empty_device(cached: CachedModel) -> None:
    _flush(cached)
    while cached.cache.evict(cached.device_pool.n_pages):
        pass


def _forget(cached: CachedModel) -> None:
    """Empties device and host."""
    deadline = time.monotonic() + PATIENCE_S
    while not cached.cache.reset():
        if time.monotonic() > deadline:
            raise RuntimeError("something is still in use")
        cached.cache.wait(0.01)


# Models.


@contextlib.contextmanager
def _opened(model: Any, n_tokens: int) -> Iterator[CachedModel]:
    """The model with room for twice as many tokens, on a store of its own."""
    with tempfile.TemporaryDirectory(prefix="hicache-bench-") as directory:
        config = HiCacheConfig(
            page_size=16,
            hicache_storage_backend="file",
            hicache_storage_backend_extra_config={"path": directory},
        )
        with CachedModel.open(model, config, device_tokens=2 * n_tokens) as cached:
            yield cached


def _prompt(model: Any, n_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    n_ids: int = model.config.vocab_size
    ids: list[int] = torch.randint(10, n_ids, (n_tokens,), generator=generator).tolist()
    return ids


def _packaged(name: str) -> LoadedModel | None:
    try:
        return PACKAGED[name](torch.float32)
    except ConfigError:
        return None


def _gemma(window: int | None) -> LoadedModel:
    """A random Gemma 3 of six layers, five of them with that window."""
    kinds = ["sliding_attention"] * 5 if window else ["full_attention"] * 5
    config = transformers.Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        sliding_window=window or WINDOW,
        layer_types=[*kinds, "full_attention"],
    )
    name = f"random Gemma 3, window {window}" if window else "random Gemma 3, full attention"
    return _random(name, transformers.Gemma3ForCausalLM, config)


def _llama() -> LoadedModel:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4
    )
    return _random("random Llama", transformers.LlamaForCausalLM, config)


def _qwen3_next() -> LoadedModel:
    """A random Qwen3-Next of four layers, three of them with a recurrent state."""
    config = transformers.Qwen3NextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return _random("tiny Qwen3-Next", transformers.Qwen3NextForCausalLM, config)


def _random(name: str, kind: Any, config: Any) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(name, kind(config).eval(), None)
