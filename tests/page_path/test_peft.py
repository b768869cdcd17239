"""Adapters of peft itself: each state of them has KV of its own, and is found again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from hicache_core.errors import SpecError
from hicache_core.types import CachedTokens

from .test_transformers_model import KNOWN, NEW_TOKENS, PROMPT, World
from .tiny_models import tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed (make setup)")

# peft still asks transformers for a setting by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

STORED, FOUND = CachedTokens(), CachedTokens(device=KNOWN)


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


def lora(**settings: Any) -> Any:
    targets = ["k_proj", "v_proj"]
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings)


def adapted(*names: str, lora_alpha: int = 16) -> Any:
    """A model with an adapter ``default``, which is on, and others beside it."""
    model = peft.get_peft_model(tiny_model("llama"), lora(lora_alpha=lora_alpha))
    for name in names:
        model.add_adapter(name, lora(lora_alpha=lora_alpha))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_" in name:
                weights.copy_(torch.randn(weights.shape, generator=generator) * 0.3)
    return model.eval()


def asked(cached: Any) -> CachedTokens:
    """What was cached; the answer is the one of the model alone."""
    sampling = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    ids = torch.tensor([PROMPT])
    want = cached.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling)
    answer = cached.generate(PROMPT, **sampling)
    assert answer.tokens == want[0, len(PROMPT) :].tolist()
    return answer.cached


def test_adapters_that_are_switched_keep_their_kv_and_find_it_again(world: World) -> None:
    cached = world.open(adapted("b"))
    for expected in (STORED, FOUND):
        for name in ("default", "b"):
            cached.model.set_adapter(name)
            assert asked(cached) == expected
        cached.model.set_adapter("default")
        with cached.model.disable_adapter():
            assert asked(cached) == expected


def test_adapters_that_are_added_scaled_merged_and_removed_have_their_own(world: World) -> None:
    cached = world.open(adapted())
    model = cached.model
    assert asked(cached) == STORED
    model.add_adapter("late", lora(init_lora_weights=False))
    model.set_adapter("late")
    assert [asked(cached), asked(cached)] == [STORED, FOUND]
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    layer.set_scale("late", 3.0)
    assert asked(cached) == STORED
    model.set_adapter("default")
    model.merge_adapter()
    assert [asked(cached), asked(cached)] == [STORED, FOUND]
    model.unmerge_adapter()
    model.delete_adapter("late")
    assert asked(cached).host == 0


@pytest.mark.parametrize("change", ["alpha", "active"])
def test_two_processes_that_differ_in_scaling_or_the_active_adapter_share_nothing(
    change: str, world: World
) -> None:
    first = world.open(adapted("b"))
    assert asked(first) == STORED
    assert first.cache.flush()
    same = world.open(adapted("b"))
    assert asked(same) == CachedTokens(storage=KNOWN)
    other = adapted("b", lora_alpha=64 if change == "alpha" else 16)
    if change == "active":
        other.set_adapter("b")
    assert asked(world.open(other)) == STORED


def test_weights_that_are_loaded_into_an_adapter_are_noticed(world: World) -> None:
    cached = world.open(adapted())
    assert asked(cached) == STORED
    state = {
        name: 2 * value for name, value in peft.get_peft_model_state_dict(cached.model).items()
    }
    peft.set_peft_model_state_dict(cached.model, state)
    assert [asked(cached), asked(cached)] == [STORED, FOUND]


@pytest.mark.parametrize(
    "settings",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["one virtual token", "eight", "prefix"],
)
@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_are_refused_by_name(settings: Any, world: World) -> None:
    model = peft.get_peft_model(tiny_model("llama"), settings()).eval()
    with pytest.raises(SpecError, match=r"adapter 'default' is a Pr.*Config: its virtual tokens"):
        world.open(model)


def test_an_adapter_that_tokens_switch_on_is_refused(world: World) -> None:
    settings = lora(alora_invocation_tokens=[5, 6])
    with pytest.raises(SpecError, match=r"adapter 'default' .* with invocation tokens"):
        world.open(peft.get_peft_model(tiny_model("llama"), settings))
