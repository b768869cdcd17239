"""Identity: KV is served to the state of the model that computed it, and to no other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hicache_core.engine.config import EngineConfig
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Output, Request, SamplingParams
from hicache_core.errors import ConfigError, SpecError
from hicache_core.integrations.identity import ModelIdentity, fingerprint_of_model
from hicache_core.types import CachedTokens, Namespace

from .test_transformers_model import KNOWN, PROMPT, World, ask, plain
from .tiny_models import tiny_model


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


class Adapters(nn.Module):
    """A linear layer with low-rank adapters that are switched as peft switches its own.

    An emulation of peft's LoRA layer: the same attributes, and nothing else of it.
    """

    def __init__(self, base: nn.Linear, names: str = "ab", scaling: float = 2.0) -> None:
        super().__init__()
        self.base_layer = base
        self.scaling = dict.fromkeys(names, scaling)
        self._active_adapter = names[:1]
        self._disable_adapters = False
        make = torch.Generator().manual_seed(7)
        for name in names:
            down = torch.randn(2, base.in_features, generator=make)
            up = torch.randn(base.out_features, 2, generator=make)
            self.register_parameter(f"down_{name}", nn.Parameter(down))
            self.register_parameter(f"up_{name}", nn.Parameter(up))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self._disable_adapters:
            return y
        name = self._active_adapter
        low_rank = x @ getattr(self, f"down_{name}").T @ getattr(self, f"up_{name}").T
        return y + low_rank * self.scaling[name]


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


def adapted(**settings: Any) -> Any:
    model = tiny_model("llama")
    attention(model).k_proj = Adapters(attention(model).k_proj, **settings)
    return model


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        attention(model).k_proj.weight.mul_(1.5)


def load(model: Any) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def load_and_assign(model: Any) -> None:
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def train_a_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()


def halve_a_buffer_that_is_not_saved(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def replace_a_buffer(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq * 0.5, persistent=False)


def scale_attention(model: Any) -> None:
    attention(model).scaling *= 2.0


def replace_a_module(model: Any) -> None:
    attention(model).k_proj = Adapters(attention(model).k_proj)


CHANGES = [
    write_in_place,
    load,
    load_and_assign,
    train_a_step,
    halve_a_buffer_that_is_not_saved,
    replace_a_buffer,
    scale_attention,
    replace_a_module,
]
Change = Callable[[Any], None]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_start_gives_another_fingerprint(change: Change) -> None:
    changed = tiny_model("llama")
    change(changed)
    assert fingerprint_of_model(changed) != fingerprint_of_model(tiny_model("llama"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_start_finds_nothing_old_and_leaves_nothing_under_the_old_name(
    change: Change, world: World
) -> None:
    cached = world.open(tiny_model("llama"))
    ask(cached, PROMPT)
    change(cached.model)
    assert ask(cached, PROMPT) == CachedTokens()
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)
    assert cached.cache.flush()
    # Another process with the first weights: it gets what they computed, and that alone.
    assert ask(world.open(tiny_model("llama")), PROMPT) == CachedTokens(storage=KNOWN)


def test_a_reset_after_a_change_stores_nothing_under_the_old_name(world: World) -> None:
    cached = world.open(tiny_model("llama"))
    write_in_place(cached.model)
    assert cached.cache.reset()
    ask(cached, PROMPT)
    assert cached.cache.flush()
    assert ask(world.open(tiny_model("llama")), PROMPT) == CachedTokens()


def test_two_caches_with_the_same_change_share(world: World) -> None:
    first, second = world.open(tiny_model("llama")), world.open(tiny_model("llama"))
    for cached in (first, second):
        load(cached.model)
    ask(first, PROMPT)
    assert first.cache.flush()
    assert ask(second, PROMPT) == CachedTokens(storage=KNOWN)


def test_weights_that_come_back_find_their_kv(world: World) -> None:
    cached = world.open(tiny_model("llama"))
    ask(cached, PROMPT)
    before = {name: value.clone() for name, value in cached.model.state_dict().items()}
    load(cached.model)
    ask(cached, PROMPT)
    cached.model.load_state_dict(before)
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)


@pytest.mark.parametrize("fingerprint", [None, "given"])
def test_each_adapter_has_its_own_kv_and_finds_it_again(
    fingerprint: str | None, world: World
) -> None:
    cached = world.open(adapted(), fingerprint=fingerprint)
    layer = attention(cached.model).k_proj
    for expected in (CachedTokens(), CachedTokens(device=KNOWN)):
        for name in "ab":
            layer._active_adapter = name
            assert ask(cached, PROMPT) == expected
        layer._disable_adapters = True
        assert ask(cached, PROMPT) == expected
        layer._disable_adapters = False


def test_processes_that_differ_in_the_active_adapter_or_its_scaling_share_nothing() -> None:
    other = adapted()
    attention(other).k_proj._active_adapter = "b"
    names = [fingerprint_of_model(model) for model in (adapted(), other, adapted(scaling=4.0))]
    assert len(set(names)) == 3


def test_tenants_stay_apart_after_a_change(world: World) -> None:
    cached = world.open(tiny_model("llama"))
    load(cached.model)
    ask(cached, PROMPT)
    assert ask(cached, PROMPT, namespace=Namespace(cache_salt="b")) == CachedTokens()


def test_what_torch_does_not_count_has_to_be_said(world: World) -> None:
    cached = world.open(tiny_model("llama"))
    ask(cached, PROMPT)
    attention(cached.model).k_proj.weight.data += 1.0
    cached.weights_changed()
    assert ask(cached, PROMPT) == CachedTokens()
    attention(cached.model).k_proj.weight.data -= 1.0
    cached.weights_changed()


def test_weights_that_change_in_the_middle_of_a_turn_store_nothing(world: World) -> None:
    cached = world.open(tiny_model("llama"))
    with cached.turn(PROMPT) as turn:
        cached.model(torch.tensor([PROMPT]), past_key_values=turn.past)
        write_in_place(cached.model)
        assert turn.store(PROMPT) == 0
    assert ask(cached, PROMPT) == CachedTokens()


def steer(module: object, inputs: object, output: Any) -> Any:
    return output + 1.0


def test_a_hook_is_refused_unless_the_caller_names_it(world: World) -> None:
    model = tiny_model("llama")
    handle = attention(model).k_proj.register_forward_hook(steer)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj' has a forward hook, ste"):
        world.open(model)
    cached = world.open(model, fingerprint="steered")
    ask(cached, PROMPT)
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)
    handle.remove()


def test_a_hook_that_comes_later_is_refused_as_long_as_it_is_there(world: World) -> None:
    cached = world.open(tiny_model("llama"))
    ask(cached, PROMPT)
    handle = attention(cached.model).k_proj.register_forward_hook(steer)
    for _ in range(2):
        with pytest.raises(ConfigError, match="has a forward hook, steer"):
            ask(cached, PROMPT)
    handle.remove()
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)


def test_what_transformers_hooks_in_to_return_attentions_changes_no_name(world: World) -> None:
    cached = world.open(tiny_model("llama", attn_implementation="eager"))
    ask(cached, PROMPT)
    shown = {"output_attentions": True, "return_dict_in_generate": True}
    assert cached.generate(PROMPT, max_new_tokens=2, **shown).cached == CachedTokens(device=KNOWN)
    assert ask(cached, PROMPT) == CachedTokens(device=KNOWN)


def test_virtual_tokens_are_refused_at_the_start(world: World) -> None:
    """Prompt and prefix tuning; the attribute is peft's."""
    model = tiny_model("llama")
    model.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(SpecError, match=r"adapter 'default' .* virtual tokens are in the KV"):
        world.open(model)


def test_weights_that_cannot_be_read_need_a_name() -> None:
    model = tiny_model("llama").to("meta")
    with pytest.raises(SpecError, match=r"cannot be read for the fingerprint .* fingerprint="):
        fingerprint_of_model(model)


def test_a_fingerprint_is_the_same_in_every_process_and_after_use() -> None:
    model = adapted()
    before = fingerprint_of_model(model)
    plain(model, PROMPT)
    assert fingerprint_of_model(model) == before
    code = (
        "from tests.page_path.test_identity import adapted, fingerprint_of_model\n"
        "print(fingerprint_of_model(adapted()))"
    )
    environ = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == before


def test_a_look_at_an_unchanged_model_reads_no_weight() -> None:
    identity = ModelIdentity(tiny_model("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hicache_core.integrations.identity._digest", None)
        assert identity.variant() is None


def test_an_engine_serves_each_state_of_its_model_its_own_kv() -> None:
    model = tiny_model("llama")
    engine = Engine(
        LoadedModel("tiny", model, None),
        World(ExitStack()).config(),
        EngineConfig(device_tokens=256),
    )
    engine.open()
    try:
        for expected in (0, KNOWN):
            assert engine_answer(engine, f"before {expected}") == (plain(model, PROMPT), expected)
        load(model)
        for expected in (0, KNOWN):
            assert engine_answer(engine, f"after {expected}") == (plain(model, PROMPT), expected)
    finally:
        engine.close()


def engine_answer(engine: Engine, request_id: str) -> tuple[list[int], int]:
    """The answer and how many tokens were cached."""
    outputs: Queue[Output] = Queue()
    sampling = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    engine.submit(Request(request_id, tuple(PROMPT), sampling), outputs.put)
    tokens: list[int] = []
    while True:
        output = outputs.get(timeout=60)
        tokens.extend(output.new_tokens)
        if output.finish_reason is not None:
            return tokens, output.cached.total
