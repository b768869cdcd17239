"""Identity: KV is served to the state of the model that computed it, and to no other."""

from __future__ import annotations

import functools
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
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


def drop_at_random(model: Any) -> None:
    attention(model).attention_dropout = 0.5
    model.train()


def hang_up_a_tensor(model: Any) -> None:
    attention(model).shift = torch.ones(3)


CHANGES = [
    hang_up_a_tensor,
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


@pytest.mark.parametrize("change", [*CHANGES, drop_at_random])
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


def change_a_text(model: Any) -> None:
    model.model.rotary_emb.rope_type = "other"


def give_none_a_value(model: Any) -> None:
    model.model.embed_tokens.max_norm = 1.0


def change_the_config(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


def replace_a_module_without_weights(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def swap_the_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


@pytest.mark.parametrize(
    "change",
    [
        change_a_text,
        give_none_a_value,
        change_the_config,
        replace_a_module_without_weights,
        swap_the_layers,
    ],
)
def test_what_a_model_has_from_its_class_is_watched_as_well(change: Change) -> None:
    """Two caches that change alike share; the first state keeps the first name."""
    identities = []
    for _ in range(2):
        model = tiny_model("llama")
        identities.append(ModelIdentity(model))
        assert identities[-1].variant() is None
        change(model)
    first, second = (identity.variant() for identity in identities)
    assert first is not None
    assert first == second


def test_functions_are_known_to_one_process_and_found_again_there() -> None:
    model = tiny_model("llama")
    identity = ModelIdentity(model)
    attention(model).shape = one = lambda x: 2 * x
    name = identity.variant()
    assert name is not None
    attention(model).shape = lambda x: 3 * x
    assert identity.variant() not in (None, name)
    attention(model).shape = one
    assert identity.variant() == name
    del attention(model).shape
    assert identity.variant() is None


def test_a_tensor_that_hangs_on_a_module_is_watched() -> None:
    model = tiny_model("llama")
    hang_up_a_tensor(model)
    identity = ModelIdentity(model)
    attention(model).shift.add_(1)
    assert identity.variant() is not None


def test_dropout_counts_while_it_drops() -> None:
    """A mode of training alone changes nothing where nothing is dropped."""
    model = tiny_model("llama", attention_dropout=0.5)
    identity = ModelIdentity(model)
    model.train()
    assert identity.variant() is not None
    model.eval()
    assert identity.variant() is None
    calm = tiny_model("llama")
    identity = ModelIdentity(calm)
    assert fingerprint_of_model(calm.train()) == identity.fingerprint
    assert identity.variant() is None


def test_another_attention_function_is_another_model() -> None:
    """One of transformers' own computes the same up to rounding."""

    def own(module: Any, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, *args, **kwargs)

    model = tiny_model("llama")
    identity = ModelIdentity(model)
    model.set_attn_implementation("eager")
    assert identity.variant() is None
    AttentionInterface.register("own", own)
    try:
        model.config._attn_implementation = "own"
        assert identity.variant() is not None
        assert fingerprint_of_model(model) != identity.fingerprint
    finally:
        del AttentionInterface._global_mapping["own"]


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


@pytest.mark.filterwarnings("ignore:The new embeddings")
def test_embeddings_resized_to_other_random_rows_share_nothing(world: World) -> None:
    caches = [world.open(tiny_model("llama")) for _ in range(2)]
    for seed, cached in enumerate(caches):
        torch.manual_seed(seed)
        cached.model.resize_token_embeddings(520, mean_resizing=False)
        assert ask(cached, PROMPT) == CachedTokens()
        assert cached.cache.flush()


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


def test_a_forward_of_its_own_is_refused_as_a_hook_is(world: World) -> None:
    """Also one that wraps the first one, and has its name."""
    cached = world.open(tiny_model("llama"))
    module = attention(cached.model).k_proj
    first = module.forward

    @functools.wraps(first)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return first(x) * 2

    module.forward = doubled
    with pytest.raises(ConfigError, match=r"k_proj' has a forward of its own, Linear\.forward"):
        ask(cached, PROMPT)
    with pytest.raises(ConfigError, match=r"give CachedModel\.open a fingerprint="):
        world.open(cached.model)
    ask(world.open(cached.model, fingerprint="doubled"), PROMPT)


def test_a_hook_for_all_modules_is_refused(world: World) -> None:
    cached = world.open(tiny_model("llama"))
    handle = register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ConfigError, match="module 'model' has a forward hook"):
            ask(cached, PROMPT)
    finally:
        handle.remove()
    ask(cached, PROMPT)


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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"is_prompt_learning": True}, "its virtual tokens are in the KV"),
        ({"alora_invocation_tokens": [5, 6]}, "switch it on behind their last place"),
    ],
)
def test_adapters_whose_kv_has_no_key_are_refused(
    settings: dict[str, Any], said: str, world: World
) -> None:
    """Prompt and prefix tuning, and activated LoRA; the attributes are peft's."""
    adapter = {"default": SimpleNamespace(**settings)}
    model = tiny_model("llama")
    model.peft_config = adapter
    with pytest.raises(SpecError, match=f"adapter 'default' .*{said}"):
        world.open(model)
    cached = world.open(tiny_model("llama"))
    cached.model.peft_config = adapter
    with pytest.raises(SpecError, match=said):
        ask(cached, PROMPT)


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


def test_an_engine_notices_adapters_that_are_added_and_switched() -> None:
    model = tiny_model("llama")
    loaded = LoadedModel("tiny", model, None)
    engine = Engine(loaded, World(ExitStack()).config(), EngineConfig(device_tokens=512))
    engine.open()
    try:
        engine_answer(engine, "plain")
        replace_a_module(model)  # as peft puts its layers around those that are there
        for name in "ab":
            attention(model).k_proj._active_adapter = name
            for expected in (0, KNOWN):
                answer = engine_answer(engine, f"{name} {expected}")
                assert answer == (plain(model, PROMPT), expected)
        attention(model).k_proj.register_forward_hook(steer)
        with pytest.raises(ConfigError, match="an Engine accepts none"):
            engine_answer(engine, "hooked")
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
