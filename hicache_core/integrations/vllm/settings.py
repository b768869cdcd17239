"""Settings of the connector, and which models it can cache; imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hicache_core.config.messages import config_error
from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.settings import BackendSettings
from hicache_core.integrations.vllm.keys import SEED_VARIABLE

_LAYOUTS = ("LBHNC", "LBNHC")


class ConnectorSettings(BaseModel):
    """``kv_connector_extra_config``.

    Attributes:
        backend: an installed backend, ``chain`` or ``dynamic``.
        backend_config: its settings, and those of its guard under ``guard``; written as a mapping,
            as JSON text or as ``@file``.
        host_bytes: host memory of each worker for pages that were read ahead, and again as much
            for pages that are being stored.
        variant: what else decides the bytes of a page: weights that were exchanged, an fp8 format,
            another rope scaling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    backend_config: BackendSettings = Field(default_factory=dict)
    host_bytes: int = Field(1 << 30, ge=1)
    variant: str = ""


def checked_settings(
    extra_config: Mapping[str, Any], *, hash_algorithm: str, environ: Mapping[str, str]
) -> ConnectorSettings:
    """Returns the settings of a connector.

    Args:
        extra_config: ``kv_connector_extra_config`` as it was written.
        hash_algorithm: vLLM's ``--prefix-caching-hash-algo``.
        environ: the environment of the engine.

    Raises:
        ConfigError: a setting is wrong, or no other process would find what this one stores.
    """
    try:
        settings = ConnectorSettings.model_validate(dict(extra_config))
    except ValidationError as error:
        raise config_error(error, ConnectorSettings, prefix="kv_connector_extra_config.") from None
    if hash_algorithm.startswith("xxhash") and SEED_VARIABLE not in environ:
        raise ConfigError(
            f"--prefix-caching-hash-algo {hash_algorithm} starts from a random seed in every "
            f"process, so none would find what another stored; use sha256, or set {SEED_VARIABLE}"
        )
    return settings


def why_not(vllm_config: Any, kv_cache_config: Any, full_attention: type[Any]) -> None:
    """Raises if the connector does not know how a model's KV is laid out.

    Args:
        vllm_config: vLLM's whole configuration.
        kv_cache_config: which blocks the model has.
        full_attention: vLLM's class of blocks with the keys and values of all tokens.

    Raises:
        ConfigError: it says what the model has, and names the tier, which stores any bytes.
    """
    found = _odd(vllm_config, kv_cache_config, full_attention)
    if found:
        raise ConfigError(
            f"HiCacheConnector does not cache {found}; use HiCacheTier under OffloadingConnector, "
            "which stores the rows of vLLM's own offloading"
        )


def _odd(vllm_config: Any, kv_cache_config: Any, full_attention: type[Any]) -> str:
    """Returns what is not known of a model, in words; empty if all is."""
    parallel, groups = vllm_config.parallel_config, kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"a model with {len(groups)} groups of KV blocks"
    spec = groups[0].kv_cache_spec
    if type(spec) is not full_attention:  # a subclass has other bytes in its blocks
        return f"blocks of the kind {type(spec).__name__}"
    layout = vllm_config.cache_config.kv_cache_layout
    n_context_ranks = parallel.prefill_context_parallel_size * parallel.decode_context_parallel_size
    odd = {
        "blocks with padding": spec.page_size_bytes != spec.unpadded_page_size_bytes,
        "layers that are spread over pipeline stages": parallel.pipeline_parallel_size > 1,
        "contexts that are spread over ranks": n_context_ranks > 1,
        f"the KV layout {layout}": layout not in _LAYOUTS,
    }
    return next((words for words, is_so in odd.items() if is_so), "")
