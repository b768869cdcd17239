"""LogitsRules: what a model's generation config says about every answer's logits."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from hicache_core.errors import ConfigError

# In the order in which ``model.generate`` applies them.
_MADE: dict[str, Callable[[Any, Any], LogitsProcessor]] = {
    "sequence_bias": lambda value, _: SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda value, _: RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, _: NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": NoBadWordsLogitsProcessor,
    "suppress_tokens": lambda value, _: SuppressTokensLogitsProcessor(value),
}
_BEGIN = "begin_suppress_tokens"

# What would change an answer as well, greedy ones included, and is not done here.
_NOT_DONE = (
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "watermarking_config",
)

# Values that change nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
}


class LogitsRules:
    """Rules that change the logits of every answer of a model. Any thread."""

    def __init__(self, made: Sequence[LogitsProcessor] = (), begin: Sequence[int] = ()) -> None:
        """Keeps its arguments; ``of`` reads them from a model.

        Args:
            made: applied in order.
            begin: tokens with which no answer begins.
        """
        self._made = made
        self._begin = list(begin)

    @classmethod
    def of(cls, model: Any) -> LogitsRules:
        """The rules that ``model.generate`` follows by default.

        Raises:
            ConfigError: the generation config has a setting that the engine does not support.
        """
        config = getattr(model, "generation_config", None)
        if wrong := [name for name in _NOT_DONE if _value(config, name) is not None]:
            found = ", ".join(f"{name} = {_value(config, name)!r}" for name in wrong)
            raise ConfigError(
                f"the model's generation config asks for what the engine does not do: {found}; set "
                "it to None in generation_config.json or model.generation_config"
            )
        ends = getattr(config, "eos_token_id", None)
        try:
            made = [
                make(value, ends)
                for name, make in _MADE.items()
                if (value := _value(config, name)) is not None
            ]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the generation config of the model is wrong: {error}") from error
        return cls(made, _value(config, _BEGIN) or ())

    def applied(self, logits: torch.Tensor, tokens: array[int], position: int) -> torch.Tensor:
        """The logits of the next token after all rules; the input is not changed.

        Args:
            logits: (vocabulary,), float32.
            tokens: prompt and answer so far, an array of type I.
            position: of the next token in the answer.
        """
        if self._made:
            ids = torch.frombuffer(tokens, dtype=torch.int32).to(logits.device, torch.int64)[None]
            scores = logits[None].clone()
            for rule in self._made:
                scores = rule(ids, scores)
            logits = scores[0]
        if self._begin and position == 0:
            logits = logits.clone()
            logits[self._begin] = -float("inf")
        return logits


def _value(config: Any, name: str) -> Any:
    """A setting of the generation config; None if it changes nothing."""
    value = getattr(config, name, None)
    neutral = value is None or value == [] or value in _NEUTRAL.get(name, ())
    return None if neutral else value
