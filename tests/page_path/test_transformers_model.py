"""CachedModel: a model with its prefixes in three tiers answers what it answers without them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.generation.streamers import BaseStreamer

from hicache_core.config.settings import HiCacheConfig
from hicache_core.copies.base import CopyLayers, Ticket
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.queues import ThreadQueue
from hicache_core.errors import InvalidTokens
from hicache_core.integrations.transformers import (
    Answer,
    CachedModel,
    CachedTokens,
    kv_spec_of,
)
from hicache_core.types import Namespace

from .tiny_models import COMMON, prompt_of, tiny_model

PAGE_SIZE = 4
NEW_TOKENS = 6


class World:
    """Caches of one test: they share a memory store, and are closed and checked at its end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._share = uuid.uuid4().hex

    def open(
        self,
        model: Any,
        *,
        device_tokens: int = 256,
        fingerprint: str | None = None,
        **settings: Any,
    ) -> CachedModel:
        """A cache of its own over the shared store: what a second process would have."""
        config = self.config(**settings)
        return self.adopt(
            CachedModel.open(model, config, device_tokens=device_tokens, fingerprint=fingerprint)
        )

    def config(self, **settings: Any) -> HiCacheConfig:
        """Small pages over the shared store, which is asked for a single one of them."""
        extra = {"share": self._share, "prefetch_threshold": 1}
        defaults = {
            "page_size": PAGE_SIZE,
            "hicache_storage_backend": "memory",
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_storage_backend_extra_config": extra,
        }
        return HiCacheConfig(**{**defaults, **settings})

    def adopt(self, cached: CachedModel) -> CachedModel:
        self._stack.enter_context(cached)
        self._stack.callback(assert_nothing_leaks, cached)
        return cached


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


@pytest.fixture
def cached(model: Any, world: World) -> CachedModel:
    return world.open(model)


def assert_nothing_leaks(cached: CachedModel) -> None:
    """Every page is in the tree or free, and none is locked any more."""
    assert cached.cache.flush()
    cached.cache.check_integrity()
    cached.cache.evict(cached.device_pool.n_pages)
    assert cached.device_pool.allocator.n_free == cached.device_pool.n_pages
    evict_units(cached)
    cached.cache.check_integrity()


def empty_device(cached: CachedModel) -> None:
    assert cached.cache.flush()
    assert cached.cache.evict(cached.device_pool.n_pages)
    evict_units(cached)


def evict_units(cached: CachedModel) -> None:
    """Takes all units of every group, which needs all of them to be free or evictable."""
    for group, pool in enumerate(cached.device_pool.groups):
        cached.cache.free_units(group, cached.cache.allocate_units(group, pool.n_pages))


def plain(model: Any, prompt: list[int]) -> list[int]:
    """The answer without any cache."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def answer_of(cached: CachedModel, prompt: list[int], **arguments: Any) -> Answer:
    answer = cached.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **arguments)
    cached.cache.check_integrity()
    return answer


def ask(cached: CachedModel, prompt: list[int], **arguments: Any) -> CachedTokens:
    """Answers with the cache, compares with the answer without; where the prefix was."""
    answer = answer_of(cached, prompt, **arguments)
    assert answer.tokens == plain(cached.model, prompt)
    return answer.cached


def whole_pages(n_tokens: int) -> int:
    return n_tokens // PAGE_SIZE * PAGE_SIZE


PROMPT = prompt_of(30)
KNOWN = whole_pages(29)


def test_a_conversation_finds_all_that_was_computed_before(cached: CachedModel) -> None:
    prompt, known = prompt_of(21), 0
    for turn in range(4):
        assert ask(cached, prompt) == CachedTokens(device=known)
        # The last token of an answer is never fed to the model.
        known = whole_pages(len(prompt) + NEW_TOKENS - 1)
        prompt = [*prompt, *plain(cached.model, prompt), *prompt_of(9, seed=turn + 1)]


def test_each_tier_serves_the_same_tokens(model: Any, world: World) -> None:
    first = world.open(model)
    assert ask(first, PROMPT) == CachedTokens()
    assert ask(first, PROMPT) == CachedTokens(device=KNOWN)
    empty_device(first)
    assert ask(first, PROMPT) == CachedTokens(host=KNOWN)
    second = world.open(model)
    assert ask(second, PROMPT) == CachedTokens(storage=KNOWN)
    assert ask(second, PROMPT) == CachedTokens(device=KNOWN)


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
@pytest.mark.parametrize("io_backend", ["kernel", "direct"])
@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_every_layout_io_backend_and_policy_serves_the_same_tokens(
    layout: str, io_backend: str, policy: str, world: World
) -> None:
    settings = {
        "hicache_mem_layout": layout,
        "hicache_io_backend": io_backend,
        "hicache_write_policy": policy,
    }
    first = world.open(tiny_model("llama"), **settings)
    assert ask(first, PROMPT) == CachedTokens()
    empty_device(first)
    assert ask(first, PROMPT) == CachedTokens(host=KNOWN)
    empty_device(first)
    assert first.cache.flush()
    second = world.open(first.model, **settings)
    assert ask(second, PROMPT) == CachedTokens(storage=KNOWN)


def test_parts_of_a_prefix_come_from_three_tiers_at_once(model: Any, world: World) -> None:
    writer = world.open(model)
    ask(writer, PROMPT)
    assert writer.cache.flush()
    reader = world.open(model)
    ask(reader, PROMPT[:18])
    empty_device(reader)
    ask(reader, PROMPT[:10])
    # A short answer of the reader went into its tiers as well; the prompt itself is what counts.
    found = ask(reader, PROMPT)
    assert found.total == KNOWN
    assert found.device >= 8
    assert found.host > 0
    assert found.storage > 0


def test_the_last_token_is_always_computed(cached: CachedModel) -> None:
    """Also where it ends a page, and all of its page is known."""
    prompt = PROMPT[:24]
    ask(cached, prompt)
    assert ask(cached, prompt) == CachedTokens(device=20)
    assert ask(cached, PROMPT[:1]) == CachedTokens()
    assert ask(cached, PROMPT[:5]) == CachedTokens(device=4)


def test_tenants_share_nothing(cached: CachedModel) -> None:
    ask(cached, PROMPT)
    for other in (Namespace(cache_salt="b"), Namespace(lora_id="b"), Namespace(extra_key="b")):
        assert ask(cached, PROMPT, namespace=other) == CachedTokens()
        assert ask(cached, PROMPT, namespace=other) == CachedTokens(device=KNOWN)


def test_other_weights_find_nothing_in_the_same_store(world: World) -> None:
    """Same architecture, same shapes, one weight differs: other keys."""
    writer = world.open(tiny_model("llama"))
    ask(writer, PROMPT)
    assert writer.cache.flush()
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    assert ask(world.open(changed), PROMPT) == CachedTokens()
    assert ask(world.open(tiny_model("llama")), PROMPT) == CachedTokens(storage=KNOWN)


def test_a_wrong_page_gives_other_tokens(cached: CachedModel) -> None:
    """The comparison that all tests here rest on can fail."""
    ask(cached, PROMPT)
    page = cached.cache.match_prefix(PROMPT, touch=False).device_pages[3]
    for layers in cached.device_pool.buffers:
        for layer in layers:
            layer[page].normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    answer = answer_of(cached, PROMPT)
    assert answer.cached == CachedTokens(device=KNOWN)
    assert answer.tokens != plain(cached.model, PROMPT)


def test_a_prompt_larger_than_the_device_tier_is_answered_and_not_kept(
    model: Any, world: World
) -> None:
    small = world.open(model, device_tokens=16)
    assert ask(small, PROMPT) == CachedTokens()
    assert ask(small, PROMPT) == CachedTokens()
    assert ask(small, PROMPT[:8]) == CachedTokens()
    assert ask(small, PROMPT[:8]) == CachedTokens(device=4)


def test_a_host_hit_without_room_on_the_device_is_computed(model: Any, world: World) -> None:
    cached = world.open(model, device_tokens=40)
    ask(cached, PROMPT)
    empty_device(cached)
    taken = cached.cache.allocate(5)
    assert ask(cached, PROMPT) == CachedTokens()
    cached.cache.free(taken)
    assert ask(cached, PROMPT) == CachedTokens(host=KNOWN)


class FailingQueue(ThreadQueue):
    """An emulation of a copy engine that breaks: layer 1 of every copy raises."""

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        def copy_but_layer_1(layers: range) -> None:
            if 1 in layers:
                raise OSError("the copy engine broke")
            copy(layers)

        return super().submit(steps, copy_but_layer_1)


def test_a_load_that_fails_is_computed_instead(model: Any, world: World) -> None:
    cached = world.open(model)
    ask(cached, PROMPT)
    empty_device(cached)
    parts = cached.cache.parts
    assert parts.host is not None
    broken = KernelTransfer(parts.device, parts.host, FailingQueue(), ThreadQueue())
    broken.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.transfer, "to_device", broken.to_device)
        assert ask(cached, PROMPT) == CachedTokens()
        broken.close()
    ask(cached, PROMPT)  # the cache may tell of the failure once more
    assert ask(cached, PROMPT).total == KNOWN


class Interrupted(Exception):
    """Raised by a reader that goes away."""


class GoesAway(BaseStreamer):
    """A reader of the answer that is gone after two tokens."""

    n_puts = 0

    def put(self, value: torch.Tensor) -> None:
        self.n_puts += 1
        if self.n_puts == 3:
            raise Interrupted

    def end(self) -> None:
        pass


def test_a_turn_that_is_interrupted_leaves_no_lock_and_no_page(cached: CachedModel) -> None:
    ask(cached, PROMPT)
    with pytest.raises(Interrupted):
        answer_of(cached, [*PROMPT, 7, 8, 9], streamer=GoesAway())
    assert_nothing_leaks(cached)
    assert ask(cached, PROMPT) == CachedTokens(host=KNOWN)


def test_a_loop_of_ones_own_uses_a_turn(cached: CachedModel) -> None:
    """The plain forward, without generate."""
    for expected in (CachedTokens(), CachedTokens(device=KNOWN)):
        tokens = list(PROMPT)
        with cached.turn(torch.tensor([tokens])) as turn, torch.no_grad():
            assert turn.cached == expected
            for _ in range(NEW_TOKENS):
                n_seen = turn.past.get_seq_length()
                ids = torch.tensor([tokens[n_seen:]])
                logits = cached.model(ids, past_key_values=turn.past).logits
                tokens.append(int(logits[0, -1].argmax()))
            assert turn.store(tokens) == whole_pages(len(tokens) - 1)
        assert tokens[len(PROMPT) :] == plain(cached.model, PROMPT)


def test_a_turn_stores_only_tokens_that_it_is_told(cached: CachedModel) -> None:
    with cached.turn(PROMPT) as turn:
        with torch.no_grad():
            cached.model(torch.tensor([PROMPT]), past_key_values=turn.past)
        with pytest.raises(InvalidTokens, match="has seen 30 tokens; only 29 were given"):
            turn.store(PROMPT[:-1])


def test_a_turn_that_stores_nothing_leaves_nothing(cached: CachedModel) -> None:
    with cached.turn(PROMPT) as turn:
        cached.model(torch.tensor([PROMPT]), past_key_values=turn.past)
    assert ask(cached, PROMPT) == CachedTokens()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (torch.empty(1, 0, dtype=torch.int64), "the prompt is empty"),
        (torch.ones(2, 3, dtype=torch.int64), "found a batch of 2"),
        ([1, -2], "-2"),
        ([1, 2**32], "4294967296"),
        ([1, 2.5], "2.5"),
    ],
)
def test_what_is_no_prompt_is_refused(world: World, prompt: Any, message: str) -> None:
    cached = world.open(tiny_model("llama"))
    with pytest.raises(InvalidTokens, match=message):
        cached.generate(prompt, max_new_tokens=2)


def test_keys_and_values_of_different_widths_are_cached(world: World) -> None:
    """DeepSeek's attention in transformers caches a latent as keys, a rotary key as values."""
    own = {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 3,
    }
    torch.manual_seed(1)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**COMMON, **own})).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    assert [part.shape for part in kv_spec_of(model, "x").components] == [(1, 16), (1, 8)]
    cached = world.open(model)
    assert ask(cached, PROMPT) == CachedTokens()
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)
