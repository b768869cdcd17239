"""Tiny models of any architecture, with random weights under which each token counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.models.architectures import CLASSES, Case

VOCABULARY = 320
CONTEXT = 1024
WINDOW = 32
_SEED = 7

_SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size",
    CONTEXT: """
        max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length
        """,
    96: """
        intermediate_size d_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_dim ffn_hidden_size
        feed_forward_size dense_intermediate_size intermediate_size_mlp
        prefix_dense_intermediate_size
        """,
    64: "hidden_size d_model n_embd emb_dim embedding_size lru_width rel_extent",
    48: """
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
        """,
    WINDOW: """
        sliding_window sliding_window_size window_size attention_window_size attention_chunk_size
        local_attention index_topk indexer_budget mamba_chunk_size chunk_size kv_lora_rank
        q_lora_rank
        """,
    16: """
        head_dim dim_head kv_channels attention_head_size swa_head_dim global_head_dim v_head_dim
        qk_nope_head_dim index_head_dim index_block_size indexer_head_dim index_n_heads
        linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim
        mamba_d_state state_size ssm_state_size o_lora_rank hc_lowrank block_size
        hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim router_hidden_size
        local_attn_chunk_length lsh_attn_chunk_length
        """,
    8: """
        qk_rope_head_dim mamba_n_heads mamba_num_heads mamba_dt_rank rotary_dim adapter_rank d_rel
        laurel_rank indexer_compress_ratio
        """,
    4: """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers
        num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads num_buckets
        num_experts num_local_experts n_routed_experts moe_num_experts
        """,
    2: """
        num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_mamba_heads
        num_experts_per_tok moe_topk moe_k zero_expert_num o_groups hc_mult index_topk_blocks
        indexer_n_heads layer_group_size max_window_layers
        """,
    1: """
        first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts n_group
        topk_group n_groups mamba_n_groups moe_num_shared_experts indexer_kv_heads
        """,
    0: "num_mtp_layers num_nextn_predict_layers",
}
_TINY = {name: size for size, names in _SIZES.items() for name in names.split()}

_EVEN_IF_NONE = (
    "head_dim",
    "hidden_size_per_layer_input",
    "indexer_budget",
    "indexer_compress_ratio",
    "indexer_head_dim",
    "indexer_kv_heads",
    "indexer_n_heads",
    "intermediate_size",
    "lru_width",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "num_key_value_heads",
    "num_kv_heads",
)
"""Sizes that are set although the published configuration leaves them to be computed."""

_HEADS, _KV_HEADS, _LATENT = "num_attention_heads", "num_key_value_heads", "kv_lora_rank"
_KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "block_types")

_SPECIAL_TOKENS = (
    "bos_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "eod_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
)

_ENDS_AND_RULES = (
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "no_repeat_ngram_size",
    "suppress_tokens",
)
"""Settings of a generation config that would end an answer, or choose its tokens."""

_KEPT = ("A_log", "D", "dt_bias")
"""Parameters of recurrent layers whose range matters."""


def tiny_fields(config_class: type[PreTrainedConfig], own: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a tiny configuration, in which every kind of layer of the architecture occurs.

    Args:
        config_class: of the architecture.
        own: fields that are set otherwise; those of a nested configuration are a mapping.
    """
    known = {field.name: field for field in dataclasses.fields(config_class)}
    made: dict[str, Any] = {
        name: size
        for name, size in _TINY.items()
        if name in known and (known[name].default is not None or name in _EVEN_IF_NONE)
    }
    if _LATENT in known and _KV_HEADS in known:
        made[_KV_HEADS] = made[_HEADS]  # latent attention has a head of KV for each query head
    for name in known.keys() & set(_SPECIAL_TOKENS):
        made[name] = None if "None" in str(known[name].type) else 1
    if "pad_token_id" in known:
        made["pad_token_id"] = 0
    parts = {
        name: kind
        for name, part in config_class.sub_configs_defaults.items()
        if (kind := _class_of_part(part)) is not None
    }
    for name, kind in parts.items():
        made[name] = {"model_type": kind.model_type, **tiny_fields(kind, own.get(name, {}))}
    made |= {name: value for name, value in own.items() if name not in parts}
    return _kinds_of_layers(config_class, made) | made


def _class_of_part(part: Any) -> Any:
    """The class of a nested configuration; None for one that is a plain dictionary."""
    kind = part.config_class
    if part.model_type and not dataclasses.is_dataclass(kind):
        kind = CONFIG_MAPPING[part.model_type]
    return kind if dataclasses.is_dataclass(kind) else None


def _kinds_of_layers(config_class: Any, made: Mapping[str, Any]) -> dict[str, list[str]]:
    """The kinds of layers that a published model has, one after the other, for a few layers."""
    found = {}
    for field in dataclasses.fields(config_class):
        if field.name in _KINDS_OF_LAYERS and field.name not in made:
            kinds = dict.fromkeys(getattr(config_class(), field.name) or ())
            few = itertools.islice(itertools.cycle(kinds), made.get("num_hidden_layers", 4))
            if len(kinds) > 1:
                found[field.name] = list(few)
    return found


def tiny_model(case: Case) -> PreTrainedModel:
    """A causal language model in float32 and eval mode that never ends an answer by itself."""
    config_class, make = _classes(case.architecture)
    torch.manual_seed(_SEED)
    model = make(config_class(**tiny_fields(config_class, case.own)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _randomize(name, weight)
    settings = model.generation_config
    for name in _ENDS_AND_RULES:
        if getattr(settings, name, None) is not None:
            setattr(settings, name, None)
    settings.pad_token_id = 0
    made: PreTrainedModel = model.float().eval()
    return made


def _classes(architecture: str) -> tuple[Any, Any]:
    """The class of an architecture's configuration, and what makes a model of one."""
    if architecture in CLASSES:
        config_class, make = (pkgutil.resolve_name(name) for name in CLASSES[architecture])
        return config_class, make
    return CONFIG_MAPPING[architecture], AutoModelForCausalLM.from_config


def _randomize(name: str, weight: torch.Tensor) -> None:
    """Weights of the size that keeps activations in range, where transformers' own hardly count."""
    if name.endswith(_KEPT):
        return
    if weight.ndim > 1:
        weight.normal_(0.0, 1.2 / math.sqrt(weight.shape[-1]))
    else:
        weight.add_(torch.randn_like(weight), alpha=0.05)
