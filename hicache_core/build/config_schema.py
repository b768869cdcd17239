"""The JSON schema of a configuration file, for editors and other tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter

from hicache_core.config.settings import ControllerKeys, HiCacheConfig
from hicache_core.config.sources import EXTRA
from hicache_core.observe.event_settings import EventsConfig
from hicache_core.plugin.dynamic import DynamicSettings
from hicache_core.plugin.manager import backend_class
from hicache_core.storage.chain.config import ChainConfig, StoreConfig

_EVENTS = "kv_events_config"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema(backend: str | None = None) -> dict[str, Any]:
    """The schema of a configuration file.

    Names and types are described, and an unknown setting at the top level is wrong. Those of the
    extra config are open, since a backend may take other names for the same: ``hicache config``
    checks them.

    Args:
        backend: the storage backend whose settings the extra config is to describe; None for the
            controller's keys only.

    Raises:
        PluginError: the backend is not installed, or does not load.
    """
    schema = HiCacheConfig.model_json_schema()
    definitions: dict[str, Any] = {}
    properties = schema["properties"]
    for key, info in HiCacheConfig.model_fields.items():
        if type(None) in get_args(info.annotation):
            properties[key]["anyOf"].append({"const": "none"})
    extra = _merged([ControllerKeys, *_models(backend)], definitions)
    properties[EXTRA] |= _also_as_text(extra)
    events = _hoisted(TypeAdapter(EventsConfig).json_schema(), definitions)
    properties[_EVENTS] |= _also_as_text(events["properties"])
    for key in (EXTRA, _EVENTS):
        del properties[key]["type"], properties[key]["additionalProperties"]
    if definitions:
        schema["$defs"] = definitions
    plain = _plain(schema)
    assert isinstance(plain, dict)
    return {"$schema": _DIALECT, **plain, "title": "Settings of HiCache"}


def _models(backend: str | None) -> Sequence[type[BaseModel]]:
    if backend is None:
        return ()
    if backend == "chain":
        return (ChainConfig,)
    own = DynamicSettings if backend == "dynamic" else backend_class(backend).Config
    return (StoreConfig, own)


def _merged(models: Sequence[type[BaseModel]], definitions: dict[str, Any]) -> dict[str, Any]:
    """The properties of all ``models``; what they refer to goes into ``definitions``."""
    merged: dict[str, Any] = {}
    for model in models:
        merged |= _hoisted(model.model_json_schema(), definitions)["properties"]
    return merged


def _hoisted(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    definitions |= schema.pop("$defs", {})
    return schema


def _also_as_text(properties: dict[str, Any]) -> dict[str, Any]:
    """An object of these properties and others, or text: JSON, or ``@file``."""
    return {"anyOf": [{"type": "object", "properties": properties}, {"type": "string"}]}


def _plain(value: object) -> object:
    """The schema as other tools read it, without what only our messages and pydantic know."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept: dict[str, object] = {
        key: _plain(item)
        for key, item in value.items()
        if not (key == "allowed" and isinstance(item, str))
    }
    if kept.get("writeOnly"):
        kept.pop("default", None)  # it is masked
    if "gt" in kept and kept.get("type") == "integer":  # bytes: also text such as 20GB
        size = {"type": kept.pop("type"), "exclusiveMinimum": kept.pop("gt")}
        kept["anyOf"] = [size, {"type": "string"}]
    return kept
