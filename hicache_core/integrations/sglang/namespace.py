"""What decides the bytes of SGLang's pages: model, pool, shape, layout and the shares of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.integrations.sglang.pools import PoolPages

ANCHOR = "kv"
_RANK_STATE = "mamba"
# Of a host pool, whatever it has of these: two pools that differ in one have other bytes.
_SHAPE = (
    "start_layer",
    "end_layer",
    "layer_num",
    "target_layer_num",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_cache_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "indexer_page_stride_size",
    "num_mamba_layers",
    "temporal_state_elem_size",
    "temporal_dtype",
    "conv_state_elem_sizes",
    "conv_dtype",
    "storage_format_tag",
)

_ARGUMENTS = (
    "revision",
    "quantization",
    "json_model_override_args",
    "kv_cache_dtype",  # the pool says uint8 for every fp8 format
    "quantization_param_path",
)
_DEFAULTS = (None, "", "{}", "auto")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that an SGLang serves.

    Attributes:
        identity: what ``model_identity`` returns.
        arguments: those of SGLang that change what the same files compute.
        version: of SGLang.
    """

    identity: str
    arguments: Mapping[str, object]
    version: str


class StorageConfig(Protocol):
    """What we use of SGLang's ``HiCacheStorageConfig``."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    model_name: str | None
    should_split_heads: bool
    dp_rank: int
    extra_config: dict[str, object] | None


def arguments_of(running: object, variant: str) -> dict[str, object]:
    """Returns what changes the pages of a model beside its files.

    Args:
        running: SGLang's arguments about its model, as attributes; None if they are not known.
        variant: of our settings.
    """
    given = {key: getattr(running, key, None) for key in _ARGUMENTS} | {"variant": variant}
    return {key: value for key, value in given.items() if value not in _DEFAULTS}


def is_shared(config: StorageConfig, pages: PoolPages, name: str) -> bool:
    """Returns whether all TP ranks hold the same bytes in a pool, so that one of them stores.

    So it is with MLA, but not for the state of its linear layers, nor for the pool of a draft model
    that has heads: each TP rank holds a share of these.

    Args:
        config: SGLang's.
        pages: of the pool.
        name: of the pool.
    """
    return config.is_mla_model and name != _RANK_STATE and not hasattr(pages.pool, "head_num")


def is_writer(config: StorageConfig) -> bool:
    """Returns whether this rank stores the pages that all TP ranks hold.

    SGLang 0.5.22 has no ``is_storage_writer``; its rule is the same.
    """
    if hasattr(config, "is_storage_writer"):
        return bool(config.is_storage_writer)
    return not config.is_mla_model or config.tp_rank == 0


def rank_of(config: StorageConfig) -> int:
    """Returns a number that no other process of this server has."""
    rank = config.dp_rank * config.pp_size + config.pp_rank
    rank = rank * config.attn_cp_size + config.attn_cp_rank
    return rank * config.tp_size + config.tp_rank


def namespace_of(
    config: StorageConfig, pages: PoolPages, name: str, model: ServedModel
) -> ForeignNamespace:
    """Returns the namespace of a pool's pages.

    The data-parallel rank is not part of it: replicas hold the same bytes.

    Args:
        config: SGLang's: whose share of the model this rank has.
        pages: of the pool.
        name: of the pool: ``kv`` or a side pool.
        model: whose pages they are.
    """
    pool = pages.pool
    shape = {key: _plain(getattr(pool, key, None)) for key in _SHAPE}
    details: dict[str, object] = {
        "pool": name,
        "kind": type(pool).__name__,
        "dtype": _plain(pool.dtype),
        "shape": {key: value for key, value in shape.items() if value is not None},
        "order": "flat" if pages.is_flat else "segments",
        "pp": [config.pp_rank, config.pp_size],
        "cp": [config.attn_cp_rank, config.attn_cp_size],
        "tp": None if is_shared(config, pages, name) else [config.tp_rank, config.tp_size],
        "arguments": {key: _plain(value) for key, value in model.arguments.items()},
    }
    return ForeignNamespace(
        "sglang", model.version, model.identity, pool.layout, pool.page_size, pages.nbytes, details
    )


def _plain(value: object) -> object:
    """Returns a value that JSON can hold."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
