"""Checks of this machine and of the stores that need no model, before one is loaded."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

from hicache_core.build.backends import (
    CHAIN,
    DYNAMIC,
    backend_from,
    checked,
    split_settings,
)
from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import ConfigError
from hicache_core.pools.limits import GB, check_memory
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.chain.config import ChainConfig
from hicache_core.types import BackendContext

_NAMESPACE = "0" * 16
"""Of a backend that only looks whether its store answers."""


def check_start(config: HiCacheConfig, n_ranks: int = 1) -> None:
    """Raises what opening the cache would raise for this machine and for the stores.

    Loading a model may take minutes; a store that cannot be reached is better known before. Call
    ``check_settings`` first.

    Args:
        config: in force.
        n_ranks: processes on this machine that each have a host pool and a status server.

    Raises:
        NotEnoughMemory: ``hicache_size`` is more than is left on this machine.
        ConfigError: the port of the status server is taken.
        BackendError: a store cannot be reached, or refuses the credentials.
    """
    if config.enable_hierarchical_cache and config.hicache_size:
        what = "host pool" if n_ranks == 1 else f"host pool of {n_ranks} ranks"
        check_memory(int(config.hicache_size * GB) * n_ranks, what)
    if config.hicache_status_port:
        for rank in range(n_ranks):
            _check_port(config.hicache_status_host, config.hicache_status_port + rank)
    name = config.hicache_storage_backend
    if name is not None:
        for backend in _backends(name, config.backend_config):
            backend.check_reachable()


def _backends(name: str, settings: Mapping[str, object]) -> Iterator[StorageBackend]:
    """A backend for each store; a class that ``dynamic`` loads is made once only, and not here."""
    if name == CHAIN:
        for link in checked(ChainConfig, settings, "chain.").links:
            yield from _backends(link.backend, {**link.config, "read_only": link.read_only})
    elif name != DYNAMIC:
        common, own = split_settings(settings)
        yield backend_from(name, own, BackendContext(_NAMESPACE, read_only=common.read_only))


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"the status server cannot listen on {host}:{port}: {error}; choose another "
            "hicache_status_port, or 0 for any free one"
        ) from error
