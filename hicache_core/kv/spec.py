"""The shape of one token's KV: components, layers, dtype, shard."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from hicache_core.errors import SpecError

DTYPE_NBYTES: dict[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of one element, by torch's name of the dtype."""

LayerRange: TypeAlias = tuple[int, int]
"""(start, stop) of the model's layers."""
HeadRange: TypeAlias = tuple[int, int, int]
"""(start, stop, total) of the model's KV heads."""

# Layers of these kinds keep every token's K and V; others (linear attention, Mamba) keep a state.
ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True, slots=True)
class Component:
    """One tensor of the cache, as one token's row of it in one layer.

    Attributes:
        name: for instance ``k``, ``v``, ``latent``, ``k_scale``.
        shape: the row's shape, for instance (heads, head_dim).
        dtype: torch's name of the dtype, one of ``DTYPE_NBYTES``.
        layers: the layers that have a row of it, ascending, counted from 0 among those of the
            spec; None for all of them.
        shared: whether all KV heads share the row, so that each rank has it whole. A spec sees
            that by itself in most shapes (``KVSpec.is_shared``).
        row_nbytes: bytes of one token's row in one layer; follows from shape and dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layers: tuple[int, ...] | None = None
    shared: bool = False
    row_nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises SpecError for an unknown dtype, an impossible dimension or list of layers."""
        if self.dtype not in DTYPE_NBYTES:
            known = ", ".join(DTYPE_NBYTES)
            raise SpecError(f"component {self.name!r}: dtype {self.dtype!r} is not one of {known}")
        if not self.shape:
            raise SpecError(f"component {self.name!r}: the shape of a row is empty")
        for size in self.shape:
            _positive(f"component {self.name!r}: shape {self.shape}, dimension", size)
        if self.layers is not None:
            _check_layers(self.name, self.layers)
        row_nbytes = math.prod(self.shape) * DTYPE_NBYTES[self.dtype]
        object.__setattr__(self, "row_nbytes", row_nbytes)


class GroupKind(enum.Enum):
    """Which units of a group a prefix needs."""

    WINDOW = "window"  # the pages that hold the last tokens before the place where one goes on
    STATE = "state"  # one snapshot, taken at that very place


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose KV does not live and die with the full pages of a prefix.

    Attributes:
        name: one of SGLang's pool names: ``swa`` and ``swa_1``, … for windows, ``mamba`` for state.
        kind: which units a prefix needs.
        spec: what a unit holds. It numbers the same layers as the spec that the group belongs to.
            A unit of a state is one snapshot: a page of one "token".
        window: tokens that a layer of a ``WINDOW`` attends to, the current one included.
    """

    name: str
    kind: GroupKind
    spec: KVSpec
    window: int = 0

    def __post_init__(self) -> None:
        """Raises SpecError for a window that does not fit the kind."""
        if (self.kind is GroupKind.WINDOW) != (self.window > 1):
            raise SpecError(
                f"group {self.name!r} of kind {self.kind.value} has a window of {self.window} "
                "tokens; a window has at least 2, and a state has none"
            )

    def page_size(self, page_size: int) -> int:
        """Tokens of a unit: ``page_size`` of a window, 1 of a state."""
        return page_size if self.kind is GroupKind.WINDOW else 1

    def first_needed(self, n_pages: int, page_size: int) -> int:
        """The first of ``n_pages`` whose unit is needed to go on after them.

        As transformers' sliding layers, the token after ``n`` others needs those from
        ``n - window + 1`` on.

        Args:
            n_pages: whole pages of the prefix; 0 needs nothing.
            page_size: tokens of a page.
        """
        if self.kind is GroupKind.STATE:
            return max(0, n_pages - 1)
        return max(0, n_pages * page_size - self.window + 1) // page_size

    def identity(self) -> dict[str, Any]:
        """As ``KVSpec.identity``, with the name of the group."""
        return {**self.spec.identity(), "group": self.name}


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The KV of one token, as this process holds it.

    Attributes:
        components: the tensors of the layers, in the order in which they are stored. One whose
            ``layers`` are all layers of the spec is kept as one with ``layers=None``.
        num_layers: layers held here.
        model_fingerprint: what config and weights made these bytes (see ``fingerprint``).
        layers: (start, stop) of the model's layers that are held.
        heads: (start, stop, total) of the model's KV heads that are held; (0, 1, 1) for MLA,
            whose latent belongs to all heads.
        groups: layers that need other pages of a prefix than all of them: windows, states. The
            components above are those of the full pages. There may be none: all layers are in
            groups, or this rank's layers have none; a page has no bytes then.
    """

    components: tuple[Component, ...]
    num_layers: int
    model_fingerprint: str
    layers: LayerRange
    heads: HeadRange
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        """Raises SpecError for fields that contradict each other."""
        names = [component.name for component in self.components]
        if len(set(names)) != len(names):
            raise SpecError(f"components need distinct names; got {names}")
        group_names = [group.name for group in self.groups]
        if len(set(group_names)) != len(group_names):
            raise SpecError(f"groups need distinct names; got {group_names}")
        for group in self.groups:
            if group.spec.layers != self.layers or group.spec.groups:
                raise SpecError(
                    f"group {group.name!r} describes layers {group.spec.layers}; it must number "
                    f"the layers {self.layers} of its model, and have no groups of its own"
                )
        _positive("num_layers", self.num_layers)
        components = tuple(_placed(component, self.num_layers) for component in self.components)
        object.__setattr__(self, "components", components)  # one spelling for the same bytes
        start, stop = self.layers
        if start < 0 or stop - start != self.num_layers:
            raise SpecError(f"layers {self.layers} are not {self.num_layers} layers of a model")
        start, stop, total = self.heads
        if not 0 <= start < stop <= total:
            raise SpecError(f"heads {self.heads}: need 0 <= start < stop <= total")
        if not self.model_fingerprint:
            raise SpecError("model_fingerprint is empty; see hicache_core.kv.fingerprint")

    @classmethod
    def mha(
        cls,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: str,
        fingerprint: str,
        v_head_dim: int | None = None,
        scale_dtype: str | None = None,
    ) -> KVSpec:
        """Keys and values for each KV head (MHA, GQA, MQA).

        Args:
            num_layers: layers of the model.
            num_heads: KV heads of the model, not its query heads.
            head_dim: width of a key.
            dtype: of keys and values.
            fingerprint: identity of config and weights.
            v_head_dim: width of a value, where it is not that of a key.
            scale_dtype: of the scale that each token and head has for k and for v, where the
                cache is quantised; adds the components ``k_scale`` and ``v_scale``.

        Raises:
            SpecError: a size is not positive or a dtype is not known.
        """
        _positive("num_heads", num_heads)
        v_dim = head_dim if v_head_dim is None else v_head_dim
        components = [
            Component("k", (num_heads, head_dim), dtype),
            Component("v", (num_heads, v_dim), dtype),
        ]
        if scale_dtype is not None:
            components.append(Component("k_scale", (num_heads, 1), scale_dtype))
            components.append(Component("v_scale", (num_heads, 1), scale_dtype))
        layers, heads = (0, num_layers), (0, num_heads, num_heads)
        return cls(tuple(components), num_layers, fingerprint, layers, heads)

    @classmethod
    def mla(
        cls,
        *,
        num_layers: int,
        kv_lora_rank: int,
        rope_dim: int,
        dtype: str,
        fingerprint: str,
    ) -> KVSpec:
        """One latent for all heads (DeepSeek's multi-head latent attention).

        The row is the compressed KV (``kv_lora_rank``) followed by the rotary key (``rope_dim``).

        Args:
            num_layers: layers of the model.
            kv_lora_rank: elements of the compressed KV.
            rope_dim: elements of the rotary key.
            dtype: torch's name of the dtype, such as ``bfloat16``.
            fingerprint: identifies config and weights of the model.

        Raises:
            SpecError: a size is not positive or the dtype is not known.
        """
        _positive("kv_lora_rank", kv_lora_rank)
        _positive("rope_dim", rope_dim)
        latent = Component("latent", (kv_lora_rank + rope_dim,), dtype)
        return cls((latent,), num_layers, fingerprint, (0, num_layers), (0, 1, 1))

    @classmethod
    def from_model_config(
        cls, config: object, *, fingerprint: str, dtype: str | None = None
    ) -> KVSpec:
        """The spec of a transformers model configuration.

        A config with ``kv_lora_rank`` is MLA. ``num_key_value_heads`` defaults to
        ``num_attention_heads``, ``head_dim`` to ``hidden_size / num_attention_heads``,
        ``v_head_dim`` to ``head_dim``. Of a multimodal config, its ``text_config`` counts.

        Args:
            config: a ``transformers.PretrainedConfig``, or anything with its attributes.
            fingerprint: identity of config and weights.
            dtype: of the cache; by default the dtype of the weights.

        Raises:
            SpecError: a field is missing or its value is impossible; the message names it.
        """
        text = getattr(config, "text_config", None) or config
        num_layers = _field(text, "num_hidden_layers")
        _refuse_state_layers(text)
        kv_dtype = dtype or _dtype_of(text, config)
        if getattr(text, "kv_lora_rank", None) is not None:
            return cls.mla(
                num_layers=num_layers,
                kv_lora_rank=_field(text, "kv_lora_rank"),
                rope_dim=_field(text, "qk_rope_head_dim"),
                dtype=kv_dtype,
                fingerprint=fingerprint,
            )
        query_heads = _field(text, "num_attention_heads")
        kv_heads = query_heads
        if getattr(text, "num_key_value_heads", None) is not None:
            kv_heads = _field(text, "num_key_value_heads")
        if query_heads % kv_heads:
            raise SpecError(
                f"num_key_value_heads {kv_heads} does not divide num_attention_heads {query_heads}"
            )
        v_head_dim = getattr(text, "v_head_dim", None)
        return cls.mha(
            num_layers=num_layers,
            num_heads=kv_heads,
            head_dim=_head_dim(text, query_heads),
            dtype=kv_dtype,
            fingerprint=fingerprint,
            v_head_dim=None if v_head_dim is None else _field(text, "v_head_dim"),
        )

    def shard(
        self, *, layers: LayerRange | None = None, heads: tuple[int, int] | None = None
    ) -> KVSpec:
        """The part of this spec that one rank holds.

        Of layers, a component keeps those in the range, and leaves if none is. A group stays even
        then, since all ranks hold the same units. Of heads, it keeps
        the same part of its first dimension as the range is of the heads held here, be these
        more or fewer; a row that all heads share stays whole (``is_shared``).

        Args:
            layers: (start, stop) of the model's layers; all that this spec has by default.
            heads: (start, stop) of the model's KV heads; all that this spec has by default.

        Raises:
            SpecError: the range is empty or not held here, or heads of a component would be
                divided.
        """
        components, num_layers = self.components, self.num_layers
        if layers is not None:
            _check_inside("layers", layers, self.layers)
            first, stop = layers[0] - self.layers[0], layers[1] - self.layers[0]
            parts = (_of_layers(component, first, stop) for component in components)
            components = tuple(part for part in parts if part is not None)
            num_layers = stop - first
        if heads is not None and heads != self.heads[:2]:
            _check_inside("heads", heads, self.heads[:2])
            components = tuple(self._of_heads(component, heads) for component in components)
        return replace(
            self,
            components=components,
            num_layers=num_layers,
            layers=layers or self.layers,
            heads=(*(heads or self.heads[:2]), self.heads[2]),
            groups=tuple(_sharded(group, layers, heads) for group in self.groups),
        )

    def _of_heads(self, component: Component, heads: tuple[int, int]) -> Component:
        if self.is_shared(component):
            return replace(component, shared=True)
        held = self.heads[1] - self.heads[0]
        first, n_heads = component.shape[0] * (heads[0] - self.heads[0]), heads[1] - heads[0]
        if first % held or component.shape[0] * n_heads % held:
            raise SpecError(
                f"component {component.name!r}: its {component.shape[0]} heads cannot be divided "
                f"as heads {heads} of {self.heads[:2]} are"
            )
        return replace(
            component, shape=(component.shape[0] * n_heads // held, *component.shape[1:])
        )

    def is_shared(self, component: Component) -> bool:
        """Whether all KV heads share the rows of a component of this spec.

        It says so itself, or it has one dimension whose length is not that of the heads held here,
        or one head where the model has several and all are held. ``shard`` marks what it leaves
        whole, since one head of a part may be one of several.
        """
        start, stop, total = self.heads
        if len(component.shape) == 1:
            return component.shared or component.shape[0] != stop - start
        return component.shared or component.shape[0] == 1 < stop - start == total

    def layers_of(self, component: Component) -> Sequence[int]:
        """The layers that have a row of a component, ascending, counted from 0."""
        return range(self.num_layers) if component.layers is None else component.layers

    def components_in(self, layer: int) -> list[tuple[int, int]]:
        """What a layer has: (index of the component, index of the layer among those of it)."""
        return [
            (index, layer if component.layers is None else component.layers.index(layer))
            for index, component in enumerate(self.components)
            if component.layers is None or layer in component.layers
        ]

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one token in a layer that has every component."""
        return sum(component.row_nbytes for component in self.components)

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token, all layers and components."""
        return sum(c.row_nbytes * len(self.layers_of(c)) for c in self.components)

    def page_nbytes(self, page_size: int) -> int:
        """Bytes of a page of ``page_size`` tokens, all layers and components."""
        return self.token_nbytes * page_size

    def identity(self) -> dict[str, Any]:
        """Everything that must match for the bytes of two caches to be interchangeable, as JSON.

        It goes into the namespace of the storage keys, together with page size and layout.
        """
        return {
            "model_fingerprint": self.model_fingerprint,
            "components": [_identity_of(component) for component in self.components],
            "layers": list(self.layers),
            "heads": list(self.heads),
        }


def _sharded(group: Group, layers: LayerRange | None, heads: tuple[int, int] | None) -> Group:
    """The part of a group that one rank holds.

    Raises:
        SpecError: a state would be cut by heads: its rows are not those of heads.
    """
    if heads is not None and heads != group.spec.heads[:2] and group.kind is GroupKind.STATE:
        raise SpecError(
            f"group {group.name!r} keeps a state, which cannot be cut by heads {heads}: ranks with "
            "tensor parallelism cannot share such a model"
        )
    return replace(group, spec=group.spec.shard(layers=layers, heads=heads))


def _identity_of(component: Component) -> list[object]:
    """[name, shape, dtype], and the layers if they are not all; whoever reads it knows both."""
    layers = [] if component.layers is None else [list(component.layers)]
    return [component.name, list(component.shape), component.dtype, *layers]


def _check_layers(name: str, layers: tuple[int, ...]) -> None:
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise SpecError(f"component {name!r}: layer {layer!r} is not a number of a layer")
    if not layers or list(layers) != sorted(set(layers)):
        raise SpecError(
            f"component {name!r}: layers {layers} must be at least one, ascending and distinct"
        )


def _placed(component: Component, num_layers: int) -> Component:
    """The component, checked to lie inside the layers of a spec."""
    layers = component.layers
    if layers is None:
        return component
    if layers[-1] >= num_layers:
        raise SpecError(
            f"component {component.name!r}: layer {layers[-1]} is not one of the {num_layers} "
            "layers of the spec, which are counted from 0"
        )
    return replace(component, layers=None) if len(layers) == num_layers else component


def _of_layers(component: Component, first: int, stop: int) -> Component | None:
    """What is left of a component in layers [first, stop) of its spec; None if nothing is."""
    if component.layers is None:
        return component
    layers = tuple(layer - first for layer in component.layers if first <= layer < stop)
    return replace(component, layers=layers) if layers else None


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SpecError(f"{name}: need a positive integer, found {value!r}")
    return value


def _check_inside(name: str, part: Sequence[int], whole: Sequence[int]) -> None:
    if not whole[0] <= part[0] < part[1] <= whole[1]:
        raise SpecError(f"{name} {tuple(part)} are not a part of the {tuple(whole)} held here")


def _field(config: object, name: str) -> int:
    value = getattr(config, name, None)
    if value is None:
        raise SpecError(f"the model's config ({type(config).__name__}) has no {name!r}")
    return _positive(f"{name!r} of the model's config", value)


def _head_dim(config: object, query_heads: int) -> int:
    if getattr(config, "head_dim", None) is not None:
        return _field(config, "head_dim")
    hidden_size = _field(config, "hidden_size")
    if hidden_size % query_heads:
        raise SpecError(
            f"the model's config has no 'head_dim', and num_attention_heads {query_heads} "
            f"does not divide hidden_size {hidden_size}"
        )
    return hidden_size // query_heads


def _dtype_of(*configs: object) -> str:
    """The weights' dtype as a name; transformers has ``dtype``, older versions ``torch_dtype``."""
    for config in configs:
        for name in ("dtype", "torch_dtype"):
            value = getattr(config, name, None)
            if value is not None:
                return str(value).removeprefix("torch.")
    raise SpecError("the model's config has no 'dtype'; pass the dtype of the KV cache")


def _refuse_state_layers(config: object) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(kinds - ATTENTION_LAYER_TYPES):
        raise SpecError(
            f"'layer_types' of the model's config has {', '.join(unknown)}: such layers keep a "
            "state, not the K and V of every token, and cannot be cached by pages"
        )
