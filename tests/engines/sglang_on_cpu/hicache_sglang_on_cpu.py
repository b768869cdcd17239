"""An emulation, for tests: lets SGLang's hierarchical cache run on a CPU.

SGLang calls ``install`` in each of its processes, as a plug-in of its group ``sglang.srt.plugins``.
On a CPU four things are missing, and everything else is SGLang's own:

- copies between the device pool and the host pool, which are GPU kernels: here torch copies them,
- host memory is pinned, which torch does for a GPU only: here it is not,
- 10 GiB of memory are kept free: here none,
- one function of ``sgl_kernel`` that fills the table of a request's tokens: here torch does.
"""

from __future__ import annotations

from typing import Any

import torch

_POOL = "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost"


def _host_rows(pool: Any, side: int, layer: int) -> torch.Tensor:
    """One layer of K (side 0) or V of a host pool, as (tokens, …) or (pages, page_size, …)."""
    buffer = pool.kv_buffer[side]
    if pool.layout == "layer_first":
        return buffer[layer]
    if pool.layout in ("page_first", "page_first_direct"):
        return buffer[:, layer]
    raise ValueError(f"the host pool has the layout {pool.layout!r}, which is not emulated")


def _index(pool: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where these tokens are in ``_host_rows``."""
    if pool.layout != "page_first_direct":
        return (tokens,)
    return tokens // pool.page_size, tokens % pool.page_size


def _load(
    pool: Any,
    _device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    layer_id: int,
    _io_backend: str,
    **_: Any,
) -> None:
    """Copies one layer of some tokens from host to device."""
    where = _index(pool, host_indices)
    for side, device in ((0, pool.device_k_buffers), (1, pool.device_v_buffers)):
        device[layer_id][device_indices] = _host_rows(pool, side, layer_id)[where]


def _backup(
    pool: Any,
    _device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    _io_backend: str,
    **_: Any,
) -> None:
    """Copies all layers of some tokens from device to host."""
    where = _index(pool, host_indices)
    for side, device in ((0, pool.device_k_buffers), (1, pool.device_v_buffers)):
        for layer, rows in enumerate(device):
            _host_rows(pool, side, layer)[where] = rows[device_indices]


def _fill_token_table(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    locations: torch.Tensor,
    _width: int,
) -> None:
    """Writes the locations of the new tokens of each request into its row of the table."""
    lengths = (ends - starts).tolist()
    for row, start, new in zip(
        rows.tolist(), starts.tolist(), torch.split(locations, lengths), strict=True
    ):
        table[row, start : start + len(new)] = new.to(table.dtype)


def _unpinned(*args: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**named, "pin_memory": False}


def install() -> None:
    """Registers what is missing; SGLang applies it."""
    from sglang.srt.mem_cache.pool_host import base
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    HookRegistry.register(f"{_POOL}.__init__", _unpinned, HookType.BEFORE)
    HookRegistry.register(f"{_POOL}.load_to_device_per_layer", _load, HookType.REPLACE)
    HookRegistry.register(f"{_POOL}.backup_from_device_all_layer", _backup, HookType.REPLACE)
    HookRegistry.register(
        "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_cpu",
        _fill_token_table,
        HookType.REPLACE,
    )
