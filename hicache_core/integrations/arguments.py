"""Arguments of ``generate``: which do not change the KV, which become part of its keys, and which
are refused."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from hicache_core.errors import ConfigError

# Settings of a GenerationConfig for which something else than ``generate`` would run, or would
# change the prompt; or that ask for a cache of another kind.
_REFUSED_SETTINGS = {
    "cache_config": "the cache is HiCache's own; leave it out",
    "cache_implementation": "the cache is HiCache's own; leave it out",
    "continuous_batching_config": "a cached generate takes one prompt at a time",
    "dola_layers": "decoding code from outside transformers may change the KV",
    "max_cache_len": "the cache is HiCache's own; leave it out",
    "penalty_alpha": "decoding code from outside transformers may change the KV",
    "token_healing": "it changes the prompt; heal the tokens before the call",
}
_KNOWN = GenerationConfig().to_dict()  # type: ignore[no-untyped-call]
_SETTINGS = frozenset(_KNOWN) - set(_REFUSED_SETTINGS)

# What works on logits and tokens, or computes with a cache of its own.
_HARMLESS = frozenset(
    {
        "assistant_model",
        "assistant_tokenizer",
        "generation_config",
        "logits_processor",
        "logits_to_keep",
        "negative_prompt_attention_mask",
        "negative_prompt_ids",
        "output_router_logits",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
        "synced_gpus",
        "tokenizer",
    }
)

_ACCEPTED = _SETTINGS | _HARMLESS | {"inputs_embeds"}

# Any of these makes transformers guess several tokens and check them together.
_ASSISTED = ("assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")


@dataclass(frozen=True, slots=True)
class Arguments:
    """The checked arguments of a ``generate``.

    Attributes:
        passed: arguments that are passed on to ``model.generate``.
        inputs: a digest of the embeddings that replace the token ids; None for token ids only.
        from_nothing: whether it must start over an empty cache.
    """

    passed: dict[str, Any]
    inputs: str | None = None
    from_nothing: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any], n_tokens: int, defaults: Any) -> Arguments:
        """Sorts ``given`` for a prompt of ``n_tokens`` tokens; computes nothing.

        Args:
            given: the arguments of the caller; None is the same as leaving one out.
            n_tokens: length of the prompt.
            defaults: the model's own GenerationConfig.

        Raises:
            ConfigError: an argument cannot be used; the message names the first one.
        """
        passed = {name: value for name, value in given.items() if value is not None}
        _take_if_default(passed, n_tokens)
        inputs = None
        if "inputs_embeds" in passed:
            inputs = _digest_of_embeddings(passed["inputs_embeds"], n_tokens)
        for name in passed:
            if name not in _ACCEPTED:
                raise ConfigError(_refusal(name))
        if passed.get("use_cache") is False:
            raise ConfigError("use_cache=False would leave nothing to cache; leave it out")
        own = passed.get("generation_config")
        if own is not None:
            passed["generation_config"] = own = copy.deepcopy(own)
            own.use_cache, own.cache_implementation = True, None
        if "token_healing" not in given and _effective("token_healing", passed, own, defaults):
            raise ConfigError(_refusal("token_healing"))
        is_assisted = "assistant_model" in passed or any(
            _effective(name, passed, own, defaults) for name in _ASSISTED
        )
        return cls(passed, inputs, is_assisted)


def _effective(name: str, passed: Mapping[str, Any], own: Any, defaults: Any) -> Any:
    """A setting as transformers finds it: argument, the config given, the model's own."""
    values = (passed.get(name), getattr(own, name, None), getattr(defaults, name, None))
    return next((value for value in values if value is not None), None)


def _refusal(name: str) -> str:
    reason = _REFUSED_SETTINGS.get(
        name,
        "it may change the KV, but the keys of pages are made from token ids only; call "
        "model.generate itself",
    )
    return f"{name} cannot be given to a cached generate: {reason}"


def _take_if_default(passed: dict[str, Any], n_tokens: int) -> None:
    """Removes masks, positions and token types that have their default values."""
    mask = passed.pop("attention_mask", None)
    if mask is not None and not _equals(mask, torch.ones(n_tokens)):
        raise ConfigError(
            f"attention_mask is not all ones for the {n_tokens} tokens of the prompt: take the "
            "padding out of the prompt, and leave the mask out"
        )
    if "position_ids" in passed and _equals(passed["position_ids"], torch.arange(n_tokens)):
        del passed["position_ids"]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in passed and _equals(passed[name], torch.zeros(n_tokens)):
            del passed[name]


def _equals(given: Any, wanted: torch.Tensor) -> bool:
    """Whether ``given``, a tensor or nested lists, holds exactly these numbers, for one prompt."""
    try:
        found = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError):
        return False
    return found.shape in (wanted.shape, (1, *wanted.shape)) and bool(
        (found.reshape(-1) == wanted).all()
    )


def _digest_of_embeddings(given: Any, n_tokens: int) -> str:
    """Names embeddings of shape (1, n_tokens, width) by their content.

    Raises:
        ConfigError: they are not one for each token of the prompt.
    """
    shape = tuple(getattr(given, "shape", ()))
    if len(shape) != 3 or shape[:2] != (1, n_tokens):
        raise ConfigError(
            f"inputs_embeds has the shape {shape}; it must be (1, {n_tokens}, width), one row for "
            "each token of the prompt"
        )
    raw = given.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"embeddings {shape} {given.dtype} ".encode() + raw.tobytes()).hexdigest()
