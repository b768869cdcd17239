"""Shard: the part of a Llama-like model that one of several ranks computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.errors import ConfigError
from hicache_core.kv.spec import KVSpec

MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Architectures that can be split: separate projections, and no norm over all heads together."""

_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")
_MLP_COLUMNS = ("mlp.gate_proj", "mlp.up_proj")


def check_split(config: Any, n_ranks: int) -> None:
    """Checks that a model can be split over ``n_ranks``; reads its configuration only.

    Raises:
        ConfigError: it cannot; the message names the numbers of ranks that are possible.
    """
    if n_ranks == 1:
        return
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"a model of type {config.model_type} cannot be split over {n_ranks} ranks; only "
            f"{', '.join(MODEL_TYPES)} can: start it with --tp 1"
        )
    n_kv_heads = config.num_key_value_heads or config.num_attention_heads
    common = math.gcd(n_kv_heads, config.num_attention_heads, config.intermediate_size)
    if common % n_ranks:
        possible = [n for n in range(1, common + 1) if common % n == 0]
        raise ConfigError(
            f"the model cannot be split over {n_ranks} ranks: it has {n_kv_heads} KV heads, "
            f"{config.num_attention_heads} query heads and {config.intermediate_size} rows between "
            f"its MLP's halves, and each must divide evenly; possible: --tp "
            f"{' or '.join(map(str, possible))}"
        )


def shard(model: Any, spec: KVSpec, ranks: TensorRanks) -> KVSpec:
    """Cuts ``model`` down to what this rank computes; enters no collective.

    Query, key, value, gate and up projections keep the rank's outputs (whole heads), output and
    down projections the rank's inputs, and their results are added up over the ranks in each
    forward. So every forward enters two collectives a layer. Embeddings and head stay whole.

    Args:
        model: a transformers ``…ForCausalLM`` in eval mode; cut in place.
        spec: of its whole KV.
        ranks: the ranks that compute it together.

    Returns:
        The spec of the heads that this rank keeps, in each group of layers too.

    Raises:
        ConfigError: as ``check_split``.
    """
    rank, n_ranks = ranks.rank, ranks.world_size
    if n_ranks == 1:
        return spec
    check_split(model.config, n_ranks)
    for layer in model.model.layers:
        for name in (*_COLUMNS, *_MLP_COLUMNS):
            _keep_outputs(layer.get_submodule(name), rank, n_ranks)
        for name in _ROWS:
            linear = layer.get_submodule(name)
            _keep_inputs(linear, rank, n_ranks)
            linear.register_forward_hook(_adding_up(ranks))
    n_heads = spec.heads[2] // n_ranks
    return spec.shard(heads=(rank * n_heads, (rank + 1) * n_heads))


def _keep_outputs(linear: nn.Linear, rank: int, n_ranks: int) -> None:
    n = linear.out_features // n_ranks
    mine = slice(rank * n, (rank + 1) * n)
    linear.weight = _own(linear.weight[mine])
    if linear.bias is not None:
        linear.bias = _own(linear.bias[mine])
    linear.out_features = n


def _keep_inputs(linear: nn.Linear, rank: int, n_ranks: int) -> None:
    n = linear.in_features // n_ranks
    linear.weight = _own(linear.weight[:, rank * n : (rank + 1) * n])
    if rank > 0:
        linear.register_parameter("bias", None)  # it is added once
    linear.in_features = n


def _own(part: torch.Tensor) -> nn.Parameter:
    """A copy, so that the whole can be freed."""
    return nn.Parameter(part.detach().clone().contiguous(), requires_grad=False)


def _adding_up(ranks: TensorRanks) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
    return lambda _module, _inputs, part: ranks.summed(part)
