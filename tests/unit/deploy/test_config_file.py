"""deploy/hicache.toml is held to the settings: each key, its default, and what it means."""

from __future__ import annotations

import re
import tomllib

from hicache_core.config.settings import ControllerKeys, HiCacheConfig
from hicache_core.config.sources import EXTRA
from hicache_core.observe.event_settings import EventsConfig, events_config
from tools.config_file import FILE, config_file

TEXT = FILE.read_text(encoding="utf-8")


def uncommented() -> str:
    """The file with every setting in force: comments keep their ``# ``."""
    return re.sub(r"(?m)^#(?=[\w\[])", "", TEXT)


def test_the_file_is_what_make_config_writes() -> None:
    assert config_file() == TEXT


def test_as_it_is_the_file_changes_nothing() -> None:
    assert HiCacheConfig.load(file=FILE) == HiCacheConfig()
    assert not HiCacheConfig.load(file=FILE).model_fields_set


def test_every_setting_is_in_it_with_its_default() -> None:
    settings = tomllib.loads(uncommented())
    assert set(settings) == set(HiCacheConfig.model_fields)
    config = HiCacheConfig.load(arguments=settings)
    plain = {key: getattr(config, key) for key in settings if not isinstance(settings[key], dict)}
    assert plain == {key: getattr(HiCacheConfig(), key) for key in plain}
    assert config.controller_keys == ControllerKeys()
    assert config.backend_config == {}
    assert events_config(config.kv_events_config) == EventsConfig()


def test_what_has_no_default_that_toml_could_write_is_named() -> None:
    written = set(tomllib.loads(uncommented())[EXTRA])
    for key in set(ControllerKeys.model_fields) - written:
        assert f"# {key} is not set." in TEXT
