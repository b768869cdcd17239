"""Checks without a model that storage backends and KV events accept their settings."""

from __future__ import annotations

from collections.abc import Mapping

from hicache_core.build.backends import checked, split_settings
from hicache_core.config.settings import HiCacheConfig
from hicache_core.observe.event_settings import events_config
from hicache_core.plugin import dynamic, manager
from hicache_core.storage.chain.config import ChainConfig


def check_settings(config: HiCacheConfig) -> None:
    """Raises what building the cache would raise for the settings of its parts; opens nothing.

    Raises:
        PluginError: a backend is not installed, does not load, or is not a backend.
        ConfigError: a setting of a backend or of KV events is unknown, missing or wrong.
    """
    events_config(config.kv_events_config)
    if config.hicache_storage_backend is not None:
        _check_store(config.hicache_storage_backend, config.backend_config)


def _check_store(name: str, settings: Mapping[str, object]) -> None:
    if name == "chain":
        for link in checked(ChainConfig, settings, "chain.").links:
            _check_store(link.backend, link.config)
        return
    _, own = split_settings(settings)
    if name == "dynamic":
        backend_class = dynamic.load_class(own)
        _, own = dynamic.split_settings(own)
    else:
        backend_class = manager.backend_class(name)
    manager.backend_settings(backend_class, own)
