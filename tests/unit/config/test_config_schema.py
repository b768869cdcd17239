"""The JSON schema: it names every setting, and takes what a file may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from hicache_core.build.config_schema import config_schema
from hicache_core.config.settings import ControllerKeys, HiCacheConfig
from hicache_core.config.sources import EXTRA
from hicache_core.errors import UnknownBackend
from hicache_core.storage.file.config import FileConfig


def extra_of(schema: dict[str, Any]) -> dict[str, Any]:
    """What the schema says of the settings of a storage backend."""
    properties: dict[str, Any] = schema["properties"][EXTRA]["anyOf"][0]["properties"]
    return properties


def parts(value: object) -> Iterator[dict[str, Any]]:
    """Every object inside a schema."""
    if isinstance(value, dict):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from parts(item)


def test_every_setting_is_described_and_no_other_is_allowed() -> None:
    schema = config_schema()
    assert set(schema["properties"]) == set(HiCacheConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert all(described["description"] for described in schema["properties"].values())
    assert set(extra_of(schema)) == set(ControllerKeys.model_fields)


def test_the_word_none_and_text_in_place_of_a_table_are_allowed_as_in_a_file() -> None:
    properties = config_schema()["properties"]
    for key in ("hicache_storage_backend", "storage_head_group", "hicache_status_port"):
        assert {"const": "none"} in properties[key]["anyOf"]
        assert HiCacheConfig.load(arguments={key: "none"}) == HiCacheConfig()
    for key in (EXTRA, "kv_events_config"):
        assert {"type": "string"} in properties[key]["anyOf"]


@pytest.mark.parametrize("name", ["file", "redis", "s3", "mooncake", "hf3fs", "chain", "dynamic"])
def test_the_settings_of_a_named_backend_are_in_it_and_all_references_lead_somewhere(
    name: str,
) -> None:
    schema = config_schema(name)
    assert len(extra_of(schema)) > len(ControllerKeys.model_fields)
    found = {part["$ref"] for part in parts(schema) if "$ref" in part}
    assert found <= {f"#/$defs/{known}" for known in schema.get("$defs", {})}
    json.dumps(schema)


def test_sizes_take_text_with_a_unit_and_secrets_have_no_default() -> None:
    described = extra_of(config_schema("file"))
    assert set(FileConfig.model_fields) < set(described)
    assert {"guard", "read_only"} < set(described)
    texts = [form for form in parts(described["max_nbytes"]) if form.get("type") == "string"]
    assert texts
    url = extra_of(config_schema("redis"))["url"]
    assert url["writeOnly"]
    assert "default" not in url


def test_no_word_of_our_messages_is_left_in_it() -> None:
    assert not [part for part in parts(config_schema("dynamic")) if "allowed" in part]


def test_a_backend_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(UnknownBackend, match="did you mean 'redis'"):
        config_schema("rediss")
