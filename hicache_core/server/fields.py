"""Unknown fields of a body: which are refused, and which values are neutral."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from hicache_core.config.sources import nearest

# What this server cannot do, and the values by which a client does not ask for it; None, False
# and empty values never do. The names are those of OpenAI, SGLang and vLLM.
NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "allowed_token_ids": (),
        "audio": (),
        "audio_data": (),
        "bad_words": (),
        "beam_width": (1,),
        "best_of": (1,),
        "bootstrap_pair_key": (),
        "chat_template": (),
        "custom_logit_processor": (),
        "custom_params": (),
        "data_parallel_rank": (-1, 0),
        "data_parallel_rank_decode": (-1, 0),
        "detokenize": (True,),
        "disagg_prefill_dp_rank": (-1, 0),
        "documents": (),
        "early_stopping": (),
        "ebnf": (),
        "echo": (),
        "flat_logprobs": (),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": (),
        "guided_choice": (),
        "guided_decoding_backend": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_json_object": (),
        "guided_regex": (),
        "guided_whitespace_pattern": (),
        "image_data": (),
        "include_stop_str_in_output": (),
        "input_embeds": (),
        "json_schema": (),
        "kv_transfer_params": (),
        "length_penalty": (1,),
        "logit_bias": (),
        "logits_processors": (),
        "logprobs": (),
        "lora_id": (),
        "lora_path": (),
        "media_io_kwargs": (),
        "min_p": (0,),
        "mm_processor_kwargs": (),
        "modalities": ("text",),
        "no_stop_trim": (),
        "nvext": (),
        "presence_penalty": (0,),
        "prompt_embeds": (),
        "prompt_logprobs": (),
        "regex": (),
        "repetition_detection": (),
        "repetition_penalty": (1,),
        "require_reasoning": (),
        "response_format": ({"type": "text"},),
        "return_bytes": (),
        "return_entropy": (),
        "return_hidden_states": (),
        "return_logprob": (),
        "return_prompt_token_ids": (),
        "return_routed_experts": (),
        "return_token_ids": (),
        "routed_dp_rank": (-1, 0),
        "session_params": (),
        "stop_regex": (),
        "structural_tag": (),
        "structured_outputs": (),
        "suffix": (),
        "thinking_token_budget": (),
        "token_ids_logprob": (),
        "tool_choice": ("none", "auto"),
        "tools": (),
        "top_logprobs": (0,),
        "top_logprobs_num": (0,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (),
        "verbosity": ("medium",),
        "video_data": (),
        "vllm_xargs": (),
        "web_search_options": (),
    }
)

# What changes nothing of an answer here, whatever it says.
WITHOUT_EFFECT = frozenset(
    """
    background conversation_id custom_labels decode_tp_size external_trace_header
    include_obfuscation include_reasoning log_metrics logprob_start_len max_dynamic_patch
    metadata min_dynamic_patch no_logs parallel_tool_calls prediction prompt_cache_key
    prompt_cache_retention received_time request_id return_text_in_logprobs
    return_tokens_as_token_ids routed_experts_start_len routing_key safety_identifier
    separate_reasoning service_tier spaces_between_special_tokens store stream_interval
    stream_reasoning trace user validation_time
    """.split()  # noqa: SIM905 - a list of this length reads better as text
)


def refusal(name: str, value: object, known: Iterable[str]) -> str:
    """Why an unknown field is refused, in words; empty if it can be ignored.

    Args:
        name: of the field.
        value: of the field.
        known: fields of the body, for a hint at a misspelt one.
    """
    if name in WITHOUT_EFFECT or _asks_for_nothing(value, NOT_SUPPORTED.get(name, ())):
        return ""
    shown = name if name.isidentifier() and len(name) <= 64 else repr(name[:64])
    if name in NOT_SUPPORTED:
        return f"{shown} is not supported by this server; leave it out"
    return f"{shown}: there is no such field{nearest(name, known) or '; leave it out'}"


def _asks_for_nothing(value: Any, neutral: tuple[object, ...]) -> bool:
    if isinstance(value, list):
        return all(_asks_for_nothing(item, neutral) for item in value)
    return not value or value in neutral
