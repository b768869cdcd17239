"""Rules for models whose KV depends on the length of the sequence."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hicache_core.types import Namespace

__all__ = ["NO_LIMIT", "Kind", "LengthRule", "PureRows", "length_rule_of"]


class Kind(enum.Enum):
    """The kind of the KV rows of a prompt.

    Attributes:
        SHORT: from forward passes that end within the limit.
        LONG: from forward passes that end beyond it, and are all alike.
        NONE: of no kind that another prompt could use.
    """

    SHORT = enum.auto()
    LONG = enum.auto()
    NONE = enum.auto()


@dataclass(frozen=True, slots=True)
class LengthRule:
    """The KV of all tokens of a forward pass depends on whether it ends within a limit.

    Attributes:
        cause: the property of the model that causes this, for messages.
        context: tokens of prompt and answer together that stay within the limit. The last token of
            an answer is never computed, so their forward passes end at ``context - 1``.
        has_long_kind: whether all forward passes beyond the limit give KV of one kind.
    """

    cause: str
    context: float
    has_long_kind: bool

    def kind_of(self, n_prompt: int) -> Kind:
        """The kind of the rows of a prompt. At the limit itself, models differ from each other."""
        if n_prompt < self.context:
            return Kind.SHORT
        return Kind.LONG if self.has_long_kind and n_prompt > self.context + 1 else Kind.NONE

    def holds(self, kind: Kind, n_tokens: int) -> bool:
        """Whether a forward pass that ends at ``n_tokens`` gives rows of a kind."""
        if kind is Kind.SHORT:
            return n_tokens < self.context
        return kind is Kind.LONG and n_tokens > self.context

    def notice(self) -> str:
        """The log message for the first prompt that is not cached."""
        which = "at this limit and one beyond" if self.has_long_kind else "from there on"
        return (
            f"the KV of this model is other beyond {self.context} tokens ({self.cause}): prompts "
            f"{which} are computed without the cache"
        )

    def namespace(self, kind: Kind, own: Namespace) -> Namespace:
        """The namespace for prompts of a kind: those beyond the limit have one of their own."""
        if kind is not Kind.LONG:
            return own
        return replace(own, extra_key=json.dumps([self.cause, self.context, own.extra_key]))


NO_LIMIT = LengthRule("", math.inf, has_long_kind=False)
"""The rule of most models: KV does not depend on the length."""


class PureRows:
    """How many leading rows of a sequence are of the kind that its prompt has.

    Attributes:
        rule: of the model.
        kind: of the prompt.
        n_rows: rows that another prompt of this kind may use.
    """

    def __init__(
        self, rule: LengthRule = NO_LIMIT, kind: Kind = Kind.SHORT, n_rows: int = 0
    ) -> None:
        """Begins with a cached prefix.

        Args:
            rule: of the model.
            kind: the kind of all rows of the prefix.
            n_rows: tokens in the prefix.
        """
        self.rule = rule
        self.kind = kind
        self.n_rows = n_rows

    def note(self, start: int, stop: int) -> None:
        """Records that a forward pass adds rows from ``start`` to ``stop``."""
        if start <= self.n_rows:
            self.n_rows = stop if self.rule.holds(self.kind, stop) else start


def length_rule_of(model: Any) -> LengthRule:
    """The rule of a model.

    Args:
        model: a transformers ``…ForCausalLM``.
    """
    rules = set(_rules(model))
    if len(rules) < 2:
        return rules.pop() if rules else NO_LIMIT
    least = min(rules, key=lambda rule: rule.context)
    return replace(least, has_long_kind=False)  # beyond it there are several kinds


def _rules(model: Any) -> Iterator[LengthRule]:
    config = model.config.get_text_config(decoder=True)
    context: Any = getattr(config, "max_position_embeddings", None)
    own_limit: Any = getattr(config, "original_max_position_embeddings", None)
    for rope in _ropes(model, config):
        match rope.get("rope_type", rope.get("type")):
            case "longrope" | "su":
                limit = own_limit or rope.get("original_max_position_embeddings") or context
                yield LengthRule("longrope", limit, has_long_kind=True)
            case "dynamic":
                yield LengthRule("dynamic rope", context, has_long_kind=False)
    if config.model_type == "doge":  # beyond it, attention chooses among all keys
        yield LengthRule("keep_window_size", config.keep_window_size, has_long_kind=False)


def _ropes(model: Any, config: Any) -> Iterator[dict[str, Any]]:
    """The parameters of every rotary embedding, one for each type of layer where they differ.

    A module may treat its parameters otherwise than their type says, and notes it.
    """
    types = {
        name for module in model.modules() for name in _names(getattr(module, "rope_type", None))
    }
    for key in ("rope_parameters", "rope_scaling"):
        found = getattr(config, key, None) or {}
        nested = [rope for rope in found.values() if isinstance(rope, dict)]
        for rope in nested or [found]:
            if not types or rope.get("rope_type") in types:
                yield rope


def _names(rope_type: Any) -> list[str]:
    if isinstance(rope_type, dict):
        return list(rope_type.values())
    return [] if rope_type is None else [rope_type]
