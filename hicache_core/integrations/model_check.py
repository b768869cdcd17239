"""Checks a model before it is cached: what its layers keep, and whether its KV can be reused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hicache_core.errors import SpecError
from hicache_core.integrations.identity import check_adapters
from hicache_core.integrations.length_rule import length_rule_of

__all__ = [
    "Probe",
    "cache_argument",
    "check_layers",
    "check_model",
    "check_same",
    "failing_as_spec_error",
    "fill",
    "forward",
    "name_of",
    "new_cache",
    "probe_tokens",
    "restart",
    "undisturbed",
    "vocabulary_of",
    "windows_of",
]

_N_PROBE = 32
"""Tokens of the prompt with which a model is tried; two thirds of them are its prefix."""

_PROBE_WINDOW = 8
"""The windows of a model while it is tried, so that the prefix fills them."""

_WINDOWS = ("sliding_window", "attention_chunk_size")

# How far logits of the same tokens may be apart, as a part of their own spread (root mean squares,
# the median over positions). Other shapes round otherwise: by less than 1e-5 in float32, with TF32
# by less than 1e-2. SmolLM2 has 4 % in bfloat16, and a model of more layers has more. Wrong KV
# moves the logits of a trained model by much more than that.
_TOLERANCE = 0.01
_COARSE_TOLERANCE = 0.2
_DECODING_TOLERANCE = 1e-4

# The same, for logits of the same tokens in the same shapes before other tokens.
_CAUSAL_TOLERANCE = 1e-4

# Kinds of layers of transformers' own cache that a PagedCache has too.
_KNOWN = frozenset(
    {
        DummyLayer,
        DynamicIndexedLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
    }
)

# Errors of a model that cannot use a cache.
_MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt that a model was tried with.

    Attributes:
        tokens: of the prompt.
        logits: of the whole prompt, (n_tokens, vocabulary), float32.
        decodes_alike: whether the model computes the same token by token. Some models with a state
            do not, so what they keep of an answer is not what they would keep of a prompt.
    """

    tokens: list[int]
    logits: torch.Tensor
    decodes_alike: bool = True


def check_model(model: Any) -> Probe:
    """Checks that a model computes the same over a cached prefix as without one.

    A prompt of 32 tokens is computed whole, and in two parts over a cache; both must give the same
    logits. Nothing is kept, and neither mode nor random state of the model is changed.

    Returns:
        The prompt, and the logits of the whole computation.

    Raises:
        SpecError: the model cannot be cached; the message says why.
    """
    check_adapters(model)
    check_layers(model.config)
    text = _text_config(model.config)
    if text.model_type == "big_bird" and text.attention_type != "original_full":
        raise SpecError(
            f"{name_of(model)} with attention_type {text.attention_type!r} attends to random "
            "blocks that depend on the length of the prompt, so its KV cannot be reused: set "
            "config.attention_type = 'original_full' before the model is made"
        )
    _check_purpose(model)
    ids = probe_tokens(model)
    n_first = len(ids) * 2 // 3
    if not n_first:
        return Probe([], torch.empty(0, 0))  # a context so short has no prefix
    with undisturbed(model), failing_as_spec_error(model, "cached", "over a cached prefix"):
        past = new_cache(model)
        whole = forward(model, ids, past)
        _check_rows(model, past, len(ids))
        _check_parts(model, ids, n_first, whole)
        _check_causal(model, ids, n_first, whole)
        if any(windows_of(model.config)):
            with _short_windows(model):
                _check_parts(model, ids, n_first, forward(model, ids, new_cache(model)))
        alike = not _forget_recurrent(past) or _decodes_alike(model, ids, n_first, whole)
    return Probe(ids, whole, alike)


def _decodes_alike(model: Any, ids: list[int], n_first: int, whole: torch.Tensor) -> bool:
    """Whether the logits are the same token by token, after the first ``n_first`` tokens.

    Without single precision rounding hides the difference, as everywhere else.
    """
    past = new_cache(model)
    forward(model, ids[:n_first], past)
    found = torch.cat([forward(model, [token], past) for token in ids[n_first:]])
    return _apart(found, whole[n_first:]) < _DECODING_TOLERANCE or not _is_exact(model)


def _check_parts(model: Any, ids: list[int], n_first: int, whole: torch.Tensor) -> None:
    """Checks that a prompt in two parts, ``n_first`` tokens and the rest, has the same logits.

    Raises:
        SpecError: they differ, or the rest would be the same after any other state.
    """
    past = new_cache(model)
    first = forward(model, ids[:n_first], past)
    without = copy.deepcopy(past)
    second = forward(model, ids[n_first:], past)
    if _forget_recurrent(without) and torch.equal(forward(model, ids[n_first:], without), second):
        raise SpecError(
            f"{name_of(model)} cannot be cached: it ignores its recurrent state when several "
            "tokens follow, in this version of transformers and with these kernels"
        )
    for got, want in ((first, whole[:n_first]), (second, whole[n_first:])):
        check_same(model, "cached", "over a cached prefix", got, want)


def _forget_recurrent(past: Cache) -> bool:
    """Sets all recurrent states to zero; False if there is none."""
    states = [
        state
        for layer in past.layers
        for state in getattr(layer, "recurrent_states", {}).values()
        if state is not None
    ]
    for state in states:
        state.zero_()
    return bool(states)


def _check_causal(model: Any, ids: list[int], n_first: int, whole: torch.Tensor) -> None:
    """Checks that the first ``n_first`` tokens have the same logits before other tokens.

    It finds an encoder where both parts of a prompt seem right: in 16 bits, or with weights that
    hardly matter. Nothing rounds otherwise here, since the shapes are the same, except of experts.

    Raises:
        SpecError: they have not.
    """
    changed = [*ids[:n_first], *reversed(ids[n_first:])]
    apart = _apart(forward(model, changed, new_cache(model))[:n_first], whole[:n_first])
    has_experts = any("expert" in name for name, _ in model.named_modules())
    if apart > (_tolerance(model) if has_experts else _CAUSAL_TOLERANCE):
        raise SpecError(
            f"{name_of(model)} cannot be cached: what it computes for a token depends on the "
            f"tokens after it{_advice(model)}"
        )


def check_layers(config: Any) -> None:
    """Raises SpecError for a model with layers of a kind that a PagedCache does not have."""
    kinds = {type(layer) for layer in _layers_of(config)}
    if others := sorted(kind.__name__ for kind in kinds - _KNOWN):
        raise SpecError(
            f"{type(config).__name__} has layers of the kind {', '.join(others)}, which keep more "
            "than KV of tokens, windows and states"
        )


def windows_of(config: Any) -> tuple[int, ...]:
    """The window of each layer in tokens, 0 for full attention.

    Raises:
        SpecError: transformers can make no cache for such a model.
    """
    return tuple(getattr(layer, "sliding_window", 0) for layer in _layers_of(config))


def _layers_of(config: Any) -> list[Any]:
    """The layers of transformers' own cache."""
    try:
        return list(DynamicCache(config=config).layers)
    except _MODEL_ERRORS as error:
        raise SpecError(
            f"transformers can make no cache for {type(config).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """Shortens the windows of a model for a while; modules may have their own copy of them."""
    owners = [_text_config(model.config), *model.modules()]
    changed = [
        (owner, name, window)
        for owner in owners
        for name in _WINDOWS
        if isinstance(window := getattr(owner, name, None), int) and window > _PROBE_WINDOW
    ]
    try:
        for owner, name, _ in changed:
            setattr(owner, name, _PROBE_WINDOW)
        yield
    finally:
        for owner, name, window in changed:
            setattr(owner, name, window)


def probe_tokens(model: Any) -> list[int]:
    """The prompt with which a model is tried: always the same, if possible without special tokens.

    It has 32 tokens, or as many as the model's context.
    """
    context = getattr(_text_config(model.config), "max_position_embeddings", None) or 0
    context = context if context > 0 else _N_PROBE  # XLNet has -1
    n_tokens = int(min(_N_PROBE, context, length_rule_of(model).context - 1))
    special = set(_special_tokens(model.config.to_dict()))
    ordinary = [token for token in range(vocabulary_of(model)) if token not in special] or [0]
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(ordinary), (max(0, n_tokens),), generator=generator)
    return [ordinary[at] for at in chosen.tolist()]


def vocabulary_of(model: Any) -> int:
    """The size of a model's vocabulary; that of its language model if it has other parts too.

    Raises:
        SpecError: its config has no vocabulary size.
    """
    size = getattr(_text_config(model.config), "vocab_size", None)
    if not size:
        raise SpecError(f"{name_of(model)} cannot be cached: its config has no vocab_size")
    return int(size)


def forward(model: Any, ids: Sequence[int], past: Cache) -> torch.Tensor:
    """Computes the logits of tokens after a prefix.

    Positions are passed as ``generate`` passes them, since some models count wrongly without.

    Args:
        model: a causal language model of transformers.
        ids: token ids that follow the prefix, ``(n_tokens,)``.
        past: the prefix; the KV of ``ids`` is added to it.

    Returns:
        float32 of shape ``(n_tokens, vocabulary)``.
    """
    logits: torch.Tensor = _call(model, ids, past, {}).logits[0]
    return logits.float()


def fill(model: Any, ids: Sequence[int], past: Cache) -> None:
    """Adds the KV of tokens to ``past``; their logits are not used.

    Args:
        model: a causal language model of transformers.
        ids: token ids that follow the prefix, ``(n_tokens,)``.
        past: the prefix; the KV of ``ids`` is added to it.
    """
    with torch.no_grad():
        _call(model, ids, past, {"logits_to_keep": 1})


def restart(model: Any) -> None:
    """Makes a model forget the longest sequence that it has seen, which dynamic rope remembers."""
    with torch.no_grad():
        _call(model, [0], new_cache(model), {"logits_to_keep": 1})


def _call(model: Any, ids: Sequence[int], past: Cache, options: dict[str, Any]) -> Any:
    """A forward pass, with those of ``options`` that the model accepts."""
    known = _parameters(model)
    if "position_ids" in known:
        start = past.get_seq_length()
        positions = torch.arange(start, start + len(ids), device=model.device)[None]
        options = {"position_ids": positions, **options}
    options = {key: value for key, value in options.items() if key in known}
    tokens = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
    return model(input_ids=tokens, use_cache=True, **{cache_argument(model): past}, **options)


def cache_argument(model: Any) -> str:
    """The argument of a model's forward that takes its cache; Mamba's has a name of its own."""
    return "cache_params" if "cache_params" in _parameters(model) else "past_key_values"


def _parameters(model: Any) -> Collection[str]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    return inspect.signature(inner.forward).parameters.keys()


def check_same(model: Any, refused: str, how: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Checks that logits are equal up to rounding.

    Args:
        model: the model that computed them.
        refused: "cached" or "batched": what the model cannot be if they differ.
        how: in words, how they were computed.
        got: logits, (n_tokens, vocabulary), float32.
        want: the expected logits, of the same shape.

    Raises:
        SpecError: they differ.
    """
    if got.shape != want.shape:
        found = f"of shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        raise SpecError(f"{name_of(model)} cannot be {refused}: its logits {how} are {found}")
    apart = _apart(got, want)
    if apart <= _tolerance(model):
        return
    raise SpecError(
        f"{name_of(model)} cannot be {refused}: its logits {how} differ by {apart:.0%} of their "
        "spread from those of the whole prompt alone; what it computes for a token depends on more "
        f"than the tokens before it{_advice(model)}"
    )


def _is_exact(model: Any) -> bool:
    return model.dtype in (torch.float32, torch.float64)


def _tolerance(model: Any) -> float:
    return _TOLERANCE if _is_exact(model) else _COARSE_TOLERANCE


def _advice(model: Any) -> str:
    """How an encoder becomes a decoder."""
    is_encoder = getattr(_text_config(model.config), "is_decoder", None) is False
    return ": a decoder is made with config.is_decoder = True" if is_encoder else ""


@contextmanager
def failing_as_spec_error(model: Any, refused: str, how: str) -> Iterator[None]:
    """Turns any error of ``model``, except a lack of memory, into a SpecError.

    Args:
        model: the model that is tried.
        refused: what cannot be done with it, as in ``check_same``.
        how: how its tokens were computed, as in ``check_same``.
    """
    try:
        yield
    except (SpecError, torch.OutOfMemoryError):
        raise
    except _MODEL_ERRORS as error:
        text = " ".join(str(error).split())[:200]
        raise SpecError(
            f"{name_of(model)} cannot be {refused}: it cannot compute tokens {how}: "
            f"{type(error).__name__}: {text}"
        ) from error


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Computes without dropout and gradients; afterwards modes and random state are as before."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def new_cache(model: Any) -> DynamicCache:
    """transformers' own cache for a model, empty."""
    return DynamicCache(config=model.config)


def _check_rows(model: Any, past: Cache, n_tokens: int) -> None:
    """Checks that every layer holds what its kind does, of each of ``n_tokens`` tokens."""
    held: list[Any] = list(past.layers)
    layers = [(at, layer) for at, layer in enumerate(held) if type(layer) is not DummyLayer]
    empty = [at for at, layer in layers if not _has_rows(layer) and not _has_state(layer)]
    if len(empty) == len(layers):
        raise SpecError(
            f"{name_of(model)} cannot be cached: it keeps no KV in the cache that it is given"
        )
    if empty:
        raise SpecError(
            f"{name_of(model)} cannot be cached: of the {len(past.layers)} layers of its config, "
            f"those numbered {', '.join(map(str, empty))} keep no KV, and pages hold that of each"
        )
    n_rows = {layer.get_seq_length() for _, layer in layers if _has_rows(layer)}
    if n_rows - {n_tokens}:
        raise SpecError(
            f"{name_of(model)} cannot be cached: it keeps {', '.join(map(str, sorted(n_rows)))} "
            f"rows of KV for {n_tokens} tokens, so it puts something of its own before the prompt"
        )


def _has_rows(layer: Any) -> bool:
    return isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0


def _has_state(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(
        layer.has_previous_state.values()
    )


def _apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The median over positions of the difference, as a fraction of the spread of ``want``.

    It is the median, since at single positions a close choice of experts may change.
    """
    known = want.isfinite().all(0)  # a model may rule out tokens with -inf
    want = want[:, known]
    got = got[:, known].nan_to_num(posinf=0.0, neginf=0.0)
    spread = want.std(-1, correction=0)
    apart = (got - want).square().mean(-1).sqrt() / spread
    apart = apart[spread > 0]
    return float(apart.median()) if len(apart) else 0.0


def _special_tokens(config: dict[str, Any]) -> Iterator[int]:
    """All numbers of a config that name tokens."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(key):  # labels have numbers for keys
            numbers = value if isinstance(value, list) else [value]
            yield from (number for number in numbers if isinstance(number, int))


def _text_config(config: Any) -> Any:
    """The part of a config that describes the language model."""
    return config.get_text_config(decoder=True)


def name_of(model: Any) -> str:
    """The class of a model, for messages."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(inner).__name__
    return kind if inner is model else f"{type(model).__name__} of {kind}"


def _check_purpose(model: Any) -> None:
    """Raises SpecError for a model that does not continue a text with what it computed of it."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise SpecError(
            f"{kind} cannot be cached: the KV of its decoder depends on what its encoder has read"
        )
    if hasattr(model, "can_generate") and not model.can_generate():
        raise SpecError(
            f"{kind} cannot be cached: it is not a causal language model of transformers"
        )
