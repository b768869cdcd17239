"""Makes storage backends without the layers around them, for tools that look at stored bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from hicache_core.config.messages import config_error
from hicache_core.plugin import dynamic, manager
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.chain.capabilities import Link
from hicache_core.storage.chain.config import ChainConfig, StoreConfig
from hicache_core.storage.read_only import ReadOnlyBackend
from hicache_core.types import BackendContext

DYNAMIC = "dynamic"
CHAIN = "chain"

M = TypeVar("M", bound=BaseModel)


def backend_from(
    name: str, settings: Mapping[str, object], context: BackendContext
) -> StorageBackend:
    """Makes the named backend; it is not opened yet.

    Args:
        name: an installed plugin, or ``dynamic`` for a class that ``settings`` names.
        settings: the backend's own settings; an unknown key is an error.
        context: what the backend may know about the cache. With ``read_only`` the store is only
            read, whatever the backend's class does.

    Raises:
        PluginError: it is not installed, does not load, or is not a backend.
        ConfigError: a setting is wrong.
    """
    if name == DYNAMIC:
        backend_class = dynamic.load_class(settings)
        _, settings = dynamic.split_settings(settings)
    else:
        backend_class = manager.backend_class(name)
    config = manager.backend_settings(backend_class, settings)
    if not context.read_only:
        return backend_class(config, context)
    return ReadOnlyBackend(backend_class.for_reading(config, replace(context, creates=False)))


def split_settings(settings: Mapping[str, object]) -> tuple[StoreConfig, dict[str, object]]:
    """Splits the settings of a backend into those that all have, and its own.

    Raises:
        ConfigError: one of the former is wrong.
    """
    own = dict(settings)
    common = {name: own.pop(name) for name in StoreConfig.model_fields if name in own}
    return checked(StoreConfig, common), own


def checked(model: type[M], settings: object, prefix: str = "") -> M:
    """``settings`` as a ``model``.

    Args:
        model: of the settings.
        settings: a mapping.
        prefix: what messages put before a key.

    Raises:
        ConfigError: a key is unknown or missing, or a value is wrong.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise config_error(error, model, prefix=prefix) from None


def bare_backend(
    name: str, settings: Mapping[str, object], context: BackendContext
) -> StorageBackend:
    """Makes the named backend without seal and guard; for ``chain``, of links without them.

    Objects then come and go as they are stored, header included, and nothing is retried, promoted
    or written behind. What is read-only stays so.

    Args:
        name: an installed plugin, ``dynamic`` or ``chain``.
        settings: as a server gets them.
        context: what the backend may know about the cache.

    Raises:
        PluginError: a backend is not installed, does not load, or is not a backend.
        ConfigError: a setting is wrong.
    """
    if name != CHAIN:
        common, own = split_settings(settings)
        return backend_from(name, own, _for_store(context, common))
    config = checked(ChainConfig, {**settings, "write": "through", "promote": False}, "chain.")
    links = []
    for link in config.links:
        for_link = _for_store(context, link)
        backend = backend_from(link.backend, link.config, for_link)
        links.append(Link(link.label, backend, read_only=for_link.read_only))
    return ChainBackend(config, context, links, _no_worker)


def _for_store(context: BackendContext, common: StoreConfig) -> BackendContext:
    return replace(context, read_only=True) if common.read_only else context


def _no_worker(_backend: StorageBackend, _max_nbytes: int) -> NoReturn:
    raise AssertionError("a chain that neither promotes nor writes behind needs no worker")
