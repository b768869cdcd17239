"""The spec of a model's KV from its ``config.json`` alone, with windows and states as groups.

A loaded model tells more (``integrations.model_spec``). This is for sizes, before there is one, and
needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hicache_core.errors import ConfigError, SpecError
from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec

_FULL = "full_attention"
_MAX_LAYERS = 100_000
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_UNNAMED = "0"
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}
"""Of models whose older configs do not list the kinds of layers: each n-th has full attention."""
_OF_STATES = re.compile(r"(mamba|ssm|linear_attn|hybrid|attn_layer)_|state_size|layers_block_type")


def read_model_config(path: Path) -> object:
    """The fields of a ``config.json`` as attributes, nested ones too.

    Args:
        path: the file, or a folder with one.

    Raises:
        ConfigError: there is none, or it is not JSON.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(
            file.read_text(encoding="utf-8"), object_hook=lambda fields: SimpleNamespace(**fields)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file} as a model's config: {error}") from None


def spec_of_config(
    config: object, *, dtype: str | None = None, state_nbytes: int | None = None
) -> KVSpec:
    """The KV of one token of a model, by groups of layers.

    Args:
        config: of ``read_model_config``, or a transformers config.
        dtype: of the KV; by default that of the weights.
        state_nbytes: bytes of one snapshot of all states, for a model whose config does not tell.

    Raises:
        SpecError: a field is missing, or the config does not tell how large a state is.
    """
    text = getattr(config, "text_config", None) or config
    kinds = _kinds(text)
    plain = SimpleNamespace(**{**_fields(text), "layer_types": None, "text_config": None})
    if getattr(plain, "dtype", None) is None and getattr(plain, "torch_dtype", None) is None:
        plain.dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    whole = KVSpec.from_model_config(plain, fingerprint=_UNNAMED, dtype=dtype)
    by_window: dict[int, list[int]] = {}
    for layer, kind in enumerate(kinds):
        if kind in (_FULL, *_WINDOWS):
            window = 0 if kind == _FULL else _number(text, _WINDOWS[kind])
            by_window.setdefault(window, []).append(layer)
    groups = [
        Group(
            f"swa_{n}" if n else "swa",
            GroupKind.WINDOW,
            _in_layers(whole, by_window[window]),
            window,
        )
        for n, window in enumerate(sorted(by_window.keys() - {0}))
    ]
    states = [n for n, kind in enumerate(kinds) if kind not in (_FULL, "shared", *_WINDOWS)]
    if states:
        components = _state(text, whole.components[0].dtype, states, state_nbytes)
        groups.append(
            Group("mamba", GroupKind.STATE, replace(whole, components=components, groups=()))
        )
    return replace(_in_layers(whole, by_window.get(0, [])), groups=tuple(groups))


def spec_of_numbers(
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    window: int = 0,
    window_layers: int = 0,
) -> KVSpec:
    """The KV of one token of a model of which only the numbers are known.

    Args:
        layers: layers that keep KV, those with a window included.
        kv_heads: heads of keys and values.
        head_dim: width of a key and of a value.
        dtype: torch's name of the dtype.
        window: tokens of a window; 0 for none.
        window_layers: how many of the layers have it.

    Raises:
        SpecError: a number is not possible.
    """
    _check_layers(layers)
    if bool(window) != bool(window_layers) or window_layers > layers:
        raise SpecError(
            f"a window of {window} tokens in {window_layers} of {layers} layers: give both, and no "
            "more layers than there are"
        )
    config = SimpleNamespace(
        num_hidden_layers=layers,
        num_attention_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        sliding_window=window,
        layer_types=["sliding_attention"] * window_layers + [_FULL] * (layers - window_layers),
    )
    return spec_of_config(config)


def _in_layers(spec: KVSpec, layers: list[int]) -> KVSpec:
    """The spec with its components in some of its layers only; without any if there are none."""
    if not layers:
        return replace(spec, components=())
    placed = (replace(component, layers=tuple(layers)) for component in spec.components)
    return replace(spec, components=tuple(placed))


def _check_layers(n_layers: int) -> None:
    if n_layers > _MAX_LAYERS:
        raise SpecError(f"a model with {n_layers:,} layers: at most {_MAX_LAYERS:,} are possible")


def _kinds(text: Any) -> list[str]:
    """The kind of each layer; ``shared`` if it uses the KV of another one."""
    n_layers = _number(text, "num_hidden_layers")
    _check_layers(n_layers)
    named = getattr(text, "layer_types", None)
    if not isinstance(named, list | tuple | type(None)):
        raise SpecError(f"the model's config has layer_types = {named!r}; need a list")
    kinds = list(named) if named else _unlisted(text, n_layers)
    if len(kinds) != n_layers:
        raise SpecError(f"the model's config has {len(kinds)} layer_types for {n_layers} layers")
    n_shared = getattr(text, "num_kv_shared_layers", None) or 0
    return kinds[: n_layers - n_shared] + ["shared"] * n_shared


def _unlisted(text: Any, n_layers: int) -> list[str]:
    """The kinds of layers of a config that does not list them."""
    indices = getattr(text, "attn_layer_indices", None)
    if indices is not None:
        return [_FULL if n in indices else "state" for n in range(n_layers)]
    interval = getattr(text, "full_attention_interval", None)
    if not interval and (
        hybrid := sorted(name for name in _fields(text) if _OF_STATES.match(name))
    ):
        raise SpecError(
            f"the model's config has {', '.join(hybrid[:3])}, so some layers keep a state, but no "
            "layer_types to say which; give the numbers of its layers instead"
        )
    if interval:
        return ["linear_attention" if (n + 1) % interval else _FULL for n in range(n_layers)]
    window = getattr(text, "sliding_window", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return [_FULL] * n_layers
    first = getattr(text, "max_window_layers", 0) if hasattr(text, "use_sliding_window") else 0
    pattern = getattr(text, "sliding_window_pattern", None) or _PATTERNS.get(
        getattr(text, "model_type", ""), 0
    )
    return [
        _FULL if n < first or (pattern and (n + 1) % pattern == 0) else "sliding_attention"
        for n in range(n_layers)
    ]


def _state(
    text: Any, dtype: str, layers: list[int], state_nbytes: int | None
) -> tuple[Component, ...]:
    """What a snapshot holds: as given, or of the gated delta rule of Qwen3-Next and its like."""
    if state_nbytes is not None:
        return (Component("state", (state_nbytes,), "uint8", (layers[0],)),)
    if getattr(text, "linear_num_value_heads", None) is None:
        raise SpecError(
            f"the model's config has {len(layers)} layers with a state, and does not tell its "
            "size: give the bytes of a snapshot of all of them"
        )
    key_heads, value_heads, key_dim, value_dim, kernel = (
        _number(text, f"linear_{name}")
        for name in (
            "num_key_heads",
            "num_value_heads",
            "key_head_dim",
            "value_head_dim",
            "conv_kernel_dim",
        )
    )
    width = 2 * key_heads * key_dim + value_heads * value_dim
    return (
        Component("conv_0", (width, kernel), dtype, tuple(layers)),
        Component("recurrent_0", (value_heads, key_dim, value_dim), "float32", tuple(layers)),
    )


def _number(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"the model's config has {name} = {value!r}; need a positive integer")
    return value


def _fields(text: Any) -> dict[str, Any]:
    """The fields of a config, its defaults included."""
    to_dict = getattr(text, "to_dict", None)
    return dict(to_dict() if to_dict is not None else vars(text))
