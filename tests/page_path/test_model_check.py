"""A model is refused in one sentence, before anything is allocated, or its KV may be reused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)
from transformers.utils import logging as hf_logging

from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import SpecError
from hicache_core.integrations.model_check import check_layers, check_model
from hicache_core.integrations.model_spec import full_kv_spec_of
from hicache_core.integrations.transformers import CachedModel

from .odd_models import odd_model

RIGHT = [
    "bart",
    "bert decoder",
    "bloom",
    "deepseek",
    "doge",
    "dynamic",
    "gpt_neo",
    "linear",
    "llama",
    "llama3",
    "llava",
    "longrope",
    "mixtral",
    "phi3",
    "qwen2_moe",
    "roberta decoder",
    "yarn",
]
REFUSED = {
    "bert": r"BertLMHeadModel cannot be cached: its logits over a cached prefix .*is_decoder",
    "block sparse": r"set config.attention_type = 'original_full'",
    "cpmant": r"64 rows of KV for 32 tokens",
    "distilbart": r"of the 3 layers of its config, those numbered 2 keep no KV",
    "electra": r"differ by \d+% of their spread .*is_decoder = True",
    "longer bart": r"cannot compute tokens over a cached prefix: IndexError",
    "openai-gpt": r"keeps no KV in the cache that it is given",
    "prophetnet": r"cannot compute tokens over a cached prefix: AssertionError",
    "roberta": r"RobertaForCausalLM cannot be cached",
    "rwkv": r"keeps no KV in the cache that it is given",
    "xlnet": r"keeps no KV in the cache that it is given",
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """transformers says of encoders what this module is about."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    yield
    hf_logging.set_verbosity(before)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_whose_kv_may_be_reused_is_accepted_in_every_precision(
    name: str, dtype: torch.dtype
) -> None:
    check_model(odd_model(name, dtype))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_whose_kv_may_not_be_reused_is_refused_in_one_sentence(name: str) -> None:
    model = odd_model(name)
    with pytest.raises(SpecError, match=REFUSED[name]) as caught:
        CachedModel.open(model, HiCacheConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bert", "electra", "roberta"])
def test_an_encoder_is_refused_where_rounding_would_hide_it(name: str) -> None:
    with pytest.raises(SpecError, match=r"depends on the tokens after it: a decoder is made"):
        check_model(odd_model(name, torch.bfloat16))


def test_an_encoder_is_refused_whose_weights_hardly_matter_yet() -> None:
    """As transformers makes them; GPT-NeoX has the same setting and is causal."""
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
    torch.manual_seed(0)
    with pytest.raises(SpecError, match="depends on the tokens after it"):
        check_model(BertLMHeadModel(BertConfig(**size, num_attention_heads=4)).eval())
    causal = GPTNeoXForCausalLM(GPTNeoXConfig(**size, num_attention_heads=4)).eval()
    assert causal.config.is_decoder is False
    check_model(causal)


def test_attention_in_both_directions_is_refused_in_every_precision() -> None:
    """As embedding models have it, whose classes are those of causal ones."""
    for dtype in (torch.float32, torch.bfloat16):
        model = odd_model("llama", dtype)
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(_without_mask, with_kwargs=True)
        with pytest.raises(SpecError, match="depends on"):
            check_model(model)


def _without_mask(module: Any, _: Any, arguments: dict[str, Any]) -> Any:
    """What a layer is given, without the mask that hides later tokens."""
    module.is_causal = False
    return (), {**arguments, "attention_mask": None}


def test_the_check_leaves_modes_random_numbers_and_gradients_as_they_were() -> None:
    """A model with dropout, some modules of it in train mode, is checked without dropout."""
    model = odd_model("bert decoder").train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    check_model(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_tokens_of_its_own_before_the_prompt_is_refused() -> None:
    """As prompt tuning puts them there: one is enough."""
    model = odd_model("llama")
    own, embed = torch.zeros(1, 1, 64), model.get_input_embeddings()
    forward = model.model.forward

    def with_one_more(input_ids: torch.Tensor, past_key_values: Any, **arguments: Any) -> Any:
        inputs = embed(input_ids)
        if past_key_values.get_seq_length() == 0:
            inputs = torch.cat([own, inputs], dim=1)
        arguments = {"use_cache": True}
        return forward(inputs_embeds=inputs, past_key_values=past_key_values, **arguments)

    model.model.forward = with_one_more
    with pytest.raises(SpecError, match="33 rows of KV for 32 tokens"):
        check_model(model)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_weights_whose_scales_follow_the_whole_prompt_are_refused() -> None:
    """As torch's dynamic int8 has them: a prefix is rounded otherwise before other tokens."""
    model = torch.ao.quantization.quantize_dynamic(
        odd_model("llama"), {torch.nn.Linear}, dtype=torch.qint8
    )
    with pytest.raises(SpecError, match="depends on more than the tokens before it"):
        check_model(model)


def test_layers_that_differ_in_shape_are_refused_where_all_need_one() -> None:
    model = odd_model("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj = torch.nn.Linear(64, 64)
    attention.v_proj = torch.nn.Linear(64, 64)
    attention.num_key_value_groups = 1
    with pytest.raises(SpecError, match="several shapes of KV"):
        full_kv_spec_of(model, "x")


def test_a_config_for_which_transformers_has_no_cache_is_refused() -> None:
    layered = Gemma2Config(num_hidden_layers=2, sliding_window=8)
    check_layers(layered)
    layered.sliding_window = None
    with pytest.raises(SpecError, match="transformers can make no cache for Gemma2Config"):
        check_layers(layered)
