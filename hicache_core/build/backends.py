"""Makes storage backends without the layers around them, for tools that look at stored bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from pydantic import ValidationError

from hicache_core.config.messages import config_error
from hicache_core.plugin import dynamic, manager
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.chain.capabilities import Link
from hicache_core.storage.chain.config import ChainConfig
from hicache_core.types import BackendContext

DYNAMIC = "dynamic"
CHAIN = "chain"


def backend_from(
    name: str, settings: Mapping[str, object], context: BackendContext
) -> StorageBackend:
    """Makes the named backend; it is not opened yet.

    Args:
        name: an installed plugin, or ``dynamic`` for a class that ``settings`` names.
        settings: the backend's own settings; an unknown key is an error.
        context: what the backend may know about the cache.

    Raises:
        PluginError: it is not installed, does not load, or is not a backend.
        ConfigError: a setting is wrong.
    """
    if name == DYNAMIC:
        backend_class = dynamic.load_class(settings)
        _, settings = dynamic.split_settings(settings)
    else:
        backend_class = manager.backend_class(name)
    return backend_class(manager.backend_settings(backend_class, settings), context)


def bare_backend(
    name: str, settings: Mapping[str, object], context: BackendContext
) -> StorageBackend:
    """Makes the named backend without seal and guard; for ``chain``, of links without them.

    Objects then come and go as they are stored, header included, and nothing is retried, promoted
    or written behind.

    Args:
        name: an installed plugin, ``dynamic`` or ``chain``.
        settings: as a server gets them. Those of the guard are left out.
        context: what the backend may know about the cache.

    Raises:
        PluginError: a backend is not installed, does not load, or is not a backend.
        ConfigError: a setting is wrong.
    """
    if name != CHAIN:
        own = {key: value for key, value in settings.items() if key != "guard"}
        return backend_from(name, own, context)
    try:
        config = ChainConfig.model_validate({**settings, "write": "through", "promote": False})
    except ValidationError as error:
        raise config_error(error, ChainConfig, prefix="chain.") from None
    links = [Link(c.label, backend_from(c.backend, c.config, context)) for c in config.links]
    return ChainBackend(config, context, links, _no_worker)


def _no_worker(_backend: StorageBackend, _max_nbytes: int) -> NoReturn:
    raise AssertionError("a chain that neither promotes nor writes behind needs no worker")
