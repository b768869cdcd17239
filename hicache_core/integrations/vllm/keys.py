"""Keys of vLLM's blocks, and what a row of its offloading holds; imports no vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.identity import model_identity
from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.kv.keys import DIGEST_NBYTES

ENGINE = "vllm"
SEED_VARIABLE = "PYTHONHASHSEED"

_GROUP_NBYTES = 4
_FIRST_GROUP = bytes(_GROUP_NBYTES)
_OLDEST = (0, 32)
_NEWEST = (0, 33)


def check_version(version: str) -> None:
    """Raises unless this version of vLLM is one that the integration is written for.

    Raises:
        ConfigError: it is older or newer, or cannot be parsed.
    """
    numbers = version.split(".")
    try:
        found = (int(numbers[0]), int(numbers[1]))
    except (ValueError, IndexError):
        found = (0, 0)
    if not _OLDEST <= found <= _NEWEST:
        raise ConfigError(
            f"this is vLLM {version}, and HiCache knows the interfaces of 0.32 and 0.33; "
            "install one of these, or another version of hicache-core"
        )


def keys_agree(hash_nbytes: int, environ: Mapping[str, str]) -> bool:
    """Returns whether another process gives a block the same hash.

    vLLM starts its SHA-256 hashes from a fixed seed, and its shorter ones (``xxhash``) from a
    random one, unless the environment sets a seed.

    Args:
        hash_nbytes: length of the block hashes.
        environ: the environment of the engine.
    """
    return hash_nbytes == DIGEST_NBYTES or SEED_VARIABLE in environ


def offload_page_hash(offload_key: bytes) -> bytes:
    """Returns the 32 bytes that name a chunk in the store.

    Args:
        offload_key: the block hash, and the number of its cache group in four bytes.

    Returns:
        The block hash itself if it has 32 bytes and belongs to the first group; else the SHA-256
        of the whole key.
    """
    block_hash, group = offload_key[:-_GROUP_NBYTES], offload_key[-_GROUP_NBYTES:]
    if len(block_hash) == DIGEST_NBYTES and group == _FIRST_GROUP:
        return block_hash
    return sha256(offload_key).digest()


def offload_keys(namespace: str, offload_keys: Sequence[bytes]) -> list[str]:
    """Returns the store's keys of chunks.

    Args:
        namespace: digest of the tier's namespace.
        offload_keys: vLLM's.
    """
    return [f"{namespace}/{offload_page_hash(key).hex()}" for key in offload_keys]


def hash_nbytes_of(offload_key: bytes) -> int:
    """Returns the length of the block hash in one of vLLM's offload keys."""
    return len(offload_key) - _GROUP_NBYTES


def block_page_hash(block_hash: bytes) -> bytes:
    """Returns the 32 bytes that name a block in the store: its hash, or the SHA-256 of that."""
    return block_hash if len(block_hash) == DIGEST_NBYTES else sha256(block_hash).digest()


def block_keys(namespace: str, block_hashes: Sequence[bytes]) -> list[str]:
    """Returns the store's keys of blocks.

    Args:
        namespace: digest of the worker's namespace.
        block_hashes: vLLM's.
    """
    return [f"{namespace}/{block_page_hash(block).hex()}" for block in block_hashes]


def tier_namespace(
    config: Any, *, version: str, single_copy: bool, variant: str = ""
) -> ForeignNamespace:
    """Returns what decides the bytes of a row in vLLM's host memory.

    A row is padded to whole memory pages. The padding is not stored: it differs between writers.

    Args:
        config: vLLM's ``OffloadingConfig``.
        version: of vLLM.
        single_copy: whether a row holds one copy for all workers, and not one part for each.
        variant: what else decides the bytes, in the user's words; may be empty.

    Raises:
        ConfigError: the rows have no bytes, or their layout has no name.
    """
    parallel, cache = config.parallel, config.cache
    n_parts = 1 if single_copy else parallel.world_size
    nbytes = config.worker_kv_bytes_per_block * cache.blocks_per_chunk * n_parts
    if nbytes < 1:
        raise ConfigError("vLLM says that a block has 0 bytes of KV; HiCache has nothing to store")
    if not config.kv_cache_layout:
        raise ConfigError(
            "vLLM does not say which layout its KV cache has, so HiCache cannot tell whether "
            "another server could read what this one stores"
        )
    details = {
        "adapter": "tier",
        "canonical": config.canonical_layout,
        "context_parallel": [parallel.pcp_size, parallel.dcp_size],
        "dtype": config.model.dtype,
        "groups": [[group.tokens_per_block, list(group.layer_names)] for group in config.groups],
        "parallel": [parallel.tp_size, parallel.pp_size],
        "single_copy": single_copy,
        "tokens_per_hash": cache.tokens_per_hash,
        **_named(variant),
    }
    return ForeignNamespace(
        engine=ENGINE,
        engine_version=version,
        model=model_identity(config.model.name),
        layout=f"vllm-{config.kv_cache_layout}",
        page_size=config.groups[0].tokens_per_block * cache.blocks_per_chunk,
        object_nbytes=nbytes,
        details=details,
    )


def connector_namespace(
    vllm_config: Any,
    group: Any,
    *,
    version: str,
    page_nbytes: int,
    dtypes: Sequence[str],
    cuts: Sequence[Sequence[int]],
    variant: str = "",
) -> ForeignNamespace:
    """Returns what decides the bytes of the connector's page: one block of every layer.

    Args:
        vllm_config: vLLM's whole configuration, as the worker has it.
        group: the one group of blocks.
        version: of vLLM.
        page_nbytes: bytes of a page.
        dtypes: of the layers' tensors.
        cuts: of each layer, into how many blocks of its kernel a block is cut, and their shape.
        variant: what else decides the bytes, in the user's words; may be empty.

    Raises:
        ConfigError: a function changes the model's configuration, and there is no ``variant``.
    """
    ranks, spec = vllm_config.parallel_config, group.kv_cache_spec
    model = vllm_config.model_config
    details = {
        "adapter": "connector",
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "cuts": [list(cut) for cut in cuts],
        "dtype": str(model.dtype),
        "dtypes": list(dtypes),
        "heads": [spec.num_kv_heads, spec.head_size],
        "hf_overrides": _overrides(model.hf_overrides, variant),
        "layers": list(group.layer_names),
        "parallel": [ranks.rank, ranks.tensor_parallel_size],
        "quantization": str(model.quantization),
        "revision": str(model.revision),
        **_named(variant),
    }
    return ForeignNamespace(
        engine=ENGINE,
        engine_version=version,
        model=model_identity(model.model),
        layout=f"vllm-{vllm_config.cache_config.kv_cache_layout}",
        page_size=vllm_config.cache_config.block_size,
        object_nbytes=page_nbytes,
        details=details,
    )


def _named(variant: str) -> dict[str, object]:
    return {"variant": variant} if variant else {}


def _overrides(hf_overrides: object, variant: str) -> str:
    """Returns what changes the model's configuration, as text that is the same in every process."""
    try:
        return json.dumps(hf_overrides, sort_keys=True)
    except TypeError:
        if variant:
            return ""
        raise ConfigError(
            "hf_overrides of this model is a function or has values that are not JSON, so HiCache "
            "cannot tell whether another engine has the same; name it with the setting variant"
        ) from None
