"""Tiny models that a cache has to look at twice, each with random weights that matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 320
LIMIT = 64
"""Where the rotary embeddings of ``longrope`` and ``dynamic`` models change."""

_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_LLAMA = {
    **_SMALL,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_BERT = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_BART = {
    **_SMALL,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 512,
    "forced_eos_token_id": None,
}
_GPT = {**_SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.2] * 8,
    "long_factor": [1.5 + 0.4 * i for i in range(8)],
    "original_max_position_embeddings": LIMIT,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}


def _rope(rope_type: str, **own: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **own}}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=LIMIT)
_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=LIMIT,
)
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_PATCHES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "fullatt_block_indexes": [0],
    "window_size": 56,
}

_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "linear": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, **_rope("linear", factor=4.0))),
    "yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, **_YARN)),
    "llama3": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, **_LLAMA3)),
    "longrope": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, rope_parameters=_LONG_ROPE)),
    "phi3": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **_LLAMA, original_max_position_embeddings=LIMIT, rope_parameters=dict(_LONG_ROPE)
        )
    ),
    "dynamic": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **{**_LLAMA, "max_position_embeddings": LIMIT}, **_rope("dynamic", factor=4.0)
        )
    ),
    "doge": lambda: hf.DogeForCausalLM(hf.DogeConfig(**_LLAMA, keep_window_size=LIMIT)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_LLAMA, **_MOE, sliding_window=None)
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**_LLAMA, **_EXPERTS)),
    "deepseek": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**_LLAMA, **_MLA})),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_VISION), text_config=hf.LlamaConfig(**_LLAMA)
        )
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config={**_LLAMA, **_rope("default", mrope_section=[2, 3, 3])},
            vision_config=_PATCHES,
            image_token_id=5,
            video_token_id=8,
            vision_start_token_id=6,
            vision_end_token_id=7,
        )
    ),
    "bert": lambda: hf.BertLMHeadModel(hf.BertConfig(**_BERT)),
    "bert decoder": lambda: hf.BertLMHeadModel(hf.BertConfig(**_BERT, is_decoder=True)),
    "roberta": lambda: hf.RobertaForCausalLM(hf.RobertaConfig(**_BERT)),
    "roberta decoder": lambda: hf.RobertaForCausalLM(hf.RobertaConfig(**_BERT, is_decoder=True)),
    "electra": lambda: hf.ElectraForCausalLM(hf.ElectraConfig(**_BERT, embedding_size=64)),
    "block sparse": lambda: hf.BigBirdForCausalLM(
        hf.BigBirdConfig(**_BERT, is_decoder=True, block_size=8, num_random_blocks=1)
    ),
    "bart": lambda: hf.BartForCausalLM(hf.BartConfig(**_BART)),
    "distilbart": lambda: hf.BartForCausalLM(hf.BartConfig(**{**_BART, "encoder_layers": 3})),
    "longer bart": lambda: hf.BartForCausalLM(hf.BartConfig(**{**_BART, "encoder_layers": 1})),
    "pegasus": lambda: hf.PegasusForCausalLM(hf.PegasusConfig(**_BART)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            **_SMALL,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=96,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=512,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(**_SMALL, hidden_size=64, n_layer=2, n_head=4)
    ),
    "falcon alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            **_SMALL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True
        )
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(
            **_SMALL,
            hidden_size=64,
            attention_hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
        )
    ),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**_GPT)),
    "xlnet": lambda: hf.XLNetLMHeadModel(
        hf.XLNetConfig(**_SMALL, d_model=64, n_layer=2, n_head=4, d_inner=96)
    ),
    "prophetnet": lambda: hf.ProphetNetForCausalLM(
        hf.ProphetNetConfig(
            **_SMALL,
            hidden_size=64,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
        )
    ),
    "cpmant": lambda: hf.CpmAntForCausalLM(
        hf.CpmAntConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_attention_heads=4,
            dim_head=16,
            dim_ff=96,
            num_hidden_layers=2,
        )
    ),
}


def odd_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One of the models above, in eval mode; it never ends an answer by itself."""
    torch.manual_seed(7)
    model = _MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # with transformers' own 0.02 hardly a token would matter
                parameter.normal_(0.0, 1.2 / math.sqrt(parameter.shape[-1]))
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    settings.forced_eos_token_id = None
    return model.to(dtype).eval()


def prompt_of(n_tokens: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens of these models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(12, 300, (n_tokens,), generator=generator).tolist()


def plain(model: Any, prompt: list[int], n_new: int) -> list[int]:
    """What the model answers without any cache of ours, greedily."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False
    )
    return output[0, len(prompt) :].tolist()
