"""HiCacheConfig: one precedence, clear errors, compatibility rules, no secret shown."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as property_settings
from hypothesis import strategies as st

from hicache_core.config.settings import ControllerKeys, HiCacheConfig
from hicache_core.config.sources import EXTRA, env_name, flag_name, mistyped, read_environ
from hicache_core.errors import ConfigError
from hicache_core.process.logs import forget_logged

NAMES = list(HiCacheConfig.model_fields)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "page_size": st.integers(1, 65536),
    "enable_hierarchical_cache": st.booleans(),
    "hicache_ratio": st.floats(0.25, 100),
    "hicache_size": st.floats(0, 1000),
    "hicache_io_backend": st.sampled_from(["kernel", "direct"]),
    "hicache_write_policy": st.sampled_from(
        ["write_through", "write_through_selective", "write_back"]
    ),
    "hicache_mem_layout": st.sampled_from(["page_first", "page_first_direct", "layer_first"]),
    "hicache_storage_backend": st.sampled_from(["file", "memory", "redis", "my-store_2"]),
    "hicache_storage_prefetch_policy": st.sampled_from(["best_effort", "wait_complete", "timeout"]),
    "prefetch_admission": st.sampled_from(["always", "cost_aware"]),
    "storage_head_group": st.integers(1, 64),
    "hicache_explain": st.booleans(),
    "hicache_tracing": st.booleans(),
    "hicache_status_port": st.integers(0, 65535),
    "hicache_status_host": st.sampled_from(["127.0.0.1", "::1"]),
    "metrics_prefix": st.sampled_from(["hicache:", "sglang:"]),
    "kv_events_config": st.dictionaries(st.just("topic"), st.text("abc", max_size=3), max_size=1),
    EXTRA: st.dictionaries(st.sampled_from(["path", "url"]), st.text(max_size=5), max_size=2),
    "radix_eviction_policy": st.sampled_from(
        ["lru", "lfu", "fifo", "slru", "priority", "s3fifo", "arc"]
    ),
    "state_snapshot_interval": st.integers(1, 100_000),
    "hicache_host_retention": st.sampled_from(["keep", "free_once_stored"]),
    "hicache_host_eviction_policy": st.sampled_from(
        ["lru", "lfu", "fifo", "slru", "priority", "s3fifo", "arc"]
    ),
    "hicache_storage_threads": st.integers(1, 256),
    "hicache_storage_max_read_nbytes": st.integers(1, 1 << 40),
    "hicache_storage_max_write_nbytes": st.integers(1, 1 << 40),
}
# A loaded machine is no failure.
patient = property_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SETTINGS = st.fixed_dictionaries({}, optional=VALUES)


@pytest.fixture(autouse=True)
def _each_test_logs_anew() -> Iterator[None]:
    forget_logged()
    yield
    forget_logged()


def refusal(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build(values)
    return str(caught.value)


def build(values: dict[str, Any]) -> HiCacheConfig:
    return HiCacheConfig(**values)


def as_text(value: object) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def test_the_strategies_cover_every_setting() -> None:
    assert set(VALUES) == set(NAMES)


def test_defaults_are_those_of_the_documents() -> None:
    config = HiCacheConfig()
    assert config.page_size == 64
    assert config.enable_hierarchical_cache is True
    assert (config.hicache_ratio, config.hicache_size) == (2.0, 0.0)
    assert config.hicache_io_backend == "kernel"
    assert config.hicache_write_policy == "write_through"
    assert config.hicache_mem_layout == "page_first"
    assert config.hicache_storage_backend is None
    assert config.hicache_storage_prefetch_policy == "best_effort"
    assert config.hicache_storage_backend_extra_config == {}
    assert set(config.sources.values()) == {"default"}


@patient
@given(arguments=SETTINGS, flags=SETTINGS, environ=SETTINGS, file=SETTINGS)
def test_arguments_beat_flags_beat_environment_beats_file_beats_defaults(
    tmp_path_factory: pytest.TempPathFactory,
    arguments: dict[str, Any],
    flags: dict[str, Any],
    environ: dict[str, Any],
    file: dict[str, Any],
) -> None:
    path = tmp_path_factory.getbasetemp() / "precedence.json"
    path.write_text(json.dumps(file))
    config = HiCacheConfig.load(
        arguments=arguments,
        flags=dict.fromkeys(NAMES) | flags,
        environ={env_name(key): as_text(value) for key, value in environ.items()},
        file=path,
    )
    for key in NAMES:
        layers = [
            (arguments, "argument"),
            (flags, f"flag {flag_name(key)}"),
            (environ, f"environment {env_name(key)}"),
            (file, f"file {path}"),
            (HiCacheConfig().model_dump(), "default"),
        ]
        values, source = next(layer for layer in layers if key in layer[0])
        assert getattr(config, key) == values[key]
        assert config.sources[key] == source
    assert config == HiCacheConfig(**config.model_dump())  # where from is no part of what


@patient
@given(flags=SETTINGS, values=SETTINGS)
def test_a_change_keeps_value_and_source_of_every_other_setting(
    flags: dict[str, Any], values: dict[str, Any]
) -> None:
    config = HiCacheConfig.load(flags=flags)
    changed = config.changed(values, "somebody")
    for key in NAMES:
        expected = (values[key], "somebody") if key in values else None
        assert (getattr(changed, key), changed.sources[key]) == (
            expected or (getattr(config, key), config.sources[key])
        )
    assert config.sources == HiCacheConfig.load(flags=flags).sources


def test_a_change_names_the_source_of_a_bad_value() -> None:
    with pytest.raises(ConfigError, match=r"page_size = 0 \(from the operator\)"):
        HiCacheConfig().changed({"page_size": 0}, "the operator")


@patient
@given(settings=SETTINGS)
def test_what_is_in_force_keeps_every_rule_and_resolves_to_itself(settings: dict[str, Any]) -> None:
    asked = HiCacheConfig(**settings)
    resolved = asked.resolve()
    in_force = resolved.in_force
    assert (in_force.hicache_mem_layout, in_force.hicache_io_backend) not in [
        ("page_first", "direct"),
        ("page_first_direct", "kernel"),
    ]
    assert (in_force.hicache_ratio > 0) != (in_force.hicache_size > 0)
    assert in_force.enable_hierarchical_cache or in_force.hicache_storage_backend is None
    assert in_force.hicache_size == asked.hicache_size
    assert in_force.hicache_size > 0 or in_force.hicache_ratio == asked.hicache_ratio
    changed = {key for key in NAMES if getattr(asked, key) != getattr(in_force, key)}
    assert changed == {change.key for change in resolved.adjustments}
    assert changed == {key for key, source in in_force.sources.items() if "rule" in source}
    assert in_force.resolve().adjustments == ()
    assert in_force.resolve().in_force == in_force
    assert resolved.asked is asked


@pytest.mark.parametrize(
    ("asked", "key", "in_force"),
    [
        (
            {"hicache_mem_layout": "page_first", "hicache_io_backend": "direct"},
            "hicache_mem_layout",
            "layer_first",
        ),
        (
            {"hicache_mem_layout": "page_first_direct", "hicache_io_backend": "kernel"},
            "hicache_io_backend",
            "direct",
        ),
        ({"hicache_ratio": 3.0, "hicache_size": 10}, "hicache_ratio", 0.0),
        (
            {"enable_hierarchical_cache": False, "hicache_storage_backend": "file"},
            "hicache_storage_backend",
            None,
        ),
    ],
)
def test_each_switch_is_logged_once(
    caplog: pytest.LogCaptureFixture, asked: dict[str, Any], key: str, in_force: object
) -> None:
    config = HiCacheConfig(**asked)
    with caplog.at_level(logging.INFO, "hicache_core"):
        assert getattr(config.resolve().in_force, key) == in_force
        config.resolve()
    lines = [record for record in caplog.records if key in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.WARNING]
    words = "none" if in_force is None else in_force
    assert f"using {words}: " in lines[0].getMessage()


def test_a_switch_of_a_mere_default_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "hicache_core"):
        HiCacheConfig(hicache_io_backend="direct").resolve()
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


# Bad values


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("page_size", 0, "an integer from 1 to 65536"),
        ("page_size", "sixty", "an integer from 1 to 65536"),
        ("page_size", True, "an integer from 1 to 65536"),
        ("page_size", 1.5, "an integer from 1 to 65536"),
        ("enable_hierarchical_cache", "perhaps", "true or false"),
        ("hicache_ratio", -1, "a number from 0"),
        ("hicache_ratio", float("nan"), "a number from 0"),
        ("hicache_size", float("inf"), "a number from 0"),
        ("hicache_io_backend", "dirct", "kernel, direct; did you mean 'direct'?"),
        ("hicache_write_policy", "write", "write_through, write_through_selective, write_back"),
        ("hicache_mem_layout", "", "page_first, page_first_direct, layer_first"),
        ("hicache_storage_prefetch_policy", None, "best_effort, wait_complete, timeout"),
        ("hicache_storage_backend", "Red is", "lower-case letters"),
        ("radix_eviction_policy", "mru", "lru, lfu, fifo, slru, priority, s3fifo, arc"),
        ("hicache_storage_threads", 0, "an integer from 1 to 256"),
    ],
)
def test_a_bad_value_names_key_value_source_and_what_is_allowed(
    key: str, value: object, allowed: str
) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"{key} = {value!r}: allowed: ")
    assert allowed in message
    if value not in (None, ""):
        with pytest.raises(ConfigError, match=f"from flag {flag_name(key)}"):
            HiCacheConfig.load(flags={key: value})


def test_every_bad_value_is_named_at_once() -> None:
    message = refusal(page_size=0, hicache_ratio=-1)
    assert "page_size = 0" in message
    assert "hicache_ratio = -1" in message


def test_no_host_tier_at_all_is_an_error() -> None:
    assert "hicache_ratio = 0 and hicache_size = 0" in refusal(hicache_ratio=0)


@pytest.mark.parametrize("source", ["arguments", "flags", "file", "constructor"])
def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path, source: str) -> None:
    values: dict[str, Any] = {"hicache_iobackend": "direct"}
    path = tmp_path / "hicache.json"
    path.write_text(json.dumps(values))
    loaders: dict[str, Callable[[], HiCacheConfig]] = {
        "constructor": lambda: build(values),
        "file": lambda: HiCacheConfig.load(file=path),
        "flags": lambda: HiCacheConfig.load(flags=values),
        "arguments": lambda: HiCacheConfig.load(arguments=values),
    }
    with pytest.raises(ConfigError, match=r"hicache_iobackend.*did you mean 'hicache_io_backend'"):
        loaders[source]()


def test_an_environment_variable_nearly_right_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"HICACHE_PAGE_SIZES": "3", "HICACHE_REDIS_PASSWORD": "x", "HICACHE_RATIO": ""}
    with caplog.at_level(logging.WARNING, "hicache_core"):
        assert read_environ(NAMES, environ) == {}
    assert caplog.messages == ["HICACHE_PAGE_SIZES is ignored; did you mean HICACHE_PAGE_SIZE?"]


def test_a_variable_that_repeats_the_word_hicache_is_warned_of() -> None:
    environ = {"HICACHE_HICACHE_RATIO": "3", "HICACHE_PAGE_SIZE": "4", "HICACHE_CONFG": "x"}
    meant = [("HICACHE_HICACHE_RATIO", "HICACHE_RATIO"), ("HICACHE_CONFG", "HICACHE_CONFIG")]
    assert mistyped(NAMES, environ) == meant


def test_a_variable_names_the_file_unless_a_file_is_given(tmp_path: Path) -> None:
    named, given = tmp_path / "named.toml", tmp_path / "given.toml"
    named.write_text("page_size = 16\nhicache_ratio = 3")
    given.write_text("page_size = 32")
    environ = {"HICACHE_CONFIG": str(named), "HICACHE_RATIO": "4"}
    config = HiCacheConfig.load(environ=environ)
    assert (config.page_size, config.hicache_ratio) == (16, 4)
    assert config.sources["page_size"] == f"file {named}"
    assert HiCacheConfig.load(environ=environ, file=given).page_size == 32
    assert HiCacheConfig.load(environ={"HICACHE_CONFIG": ""}) == HiCacheConfig()
    assert HiCacheConfig.load() == HiCacheConfig()


def test_a_file_that_the_variable_names_and_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"^HICACHE_CONFIG: configuration file gone\.toml: no such"
    ):
        HiCacheConfig.load(environ={"HICACHE_CONFIG": "gone.toml"})


def test_environment_names_are_distinct() -> None:
    assert len({env_name(key) for key in NAMES}) == len(NAMES)


# The extra config


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("extra.json", '{"path": "/data", "depth": 2}'),
        ("extra.toml", 'path = "/data"\ndepth = 2\n'),
        ("extra.yaml", "path: /data\ndepth: 2\n"),
        ("extra.YML", "path: /data\ndepth: 2\n"),
    ],
)
def test_extra_config_is_a_mapping_or_json_text_or_a_file(
    tmp_path: Path, name: str, text: str
) -> None:
    expected = {"path": "/data", "depth": 2}
    (tmp_path / name).write_text(text)
    for value in (expected, json.dumps(expected), f"@{tmp_path / name}"):
        config = build({EXTRA: value})
        assert config.hicache_storage_backend_extra_config == expected
        assert config.backend_config == expected


def test_an_extra_file_named_in_a_file_is_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "extra.json").write_text('{"path": "/data"}')
    (tmp_path / "hicache.toml").write_text(f'{EXTRA} = "@extra.json"\n')
    assert HiCacheConfig.load(file=tmp_path / "hicache.toml").backend_config == {"path": "/data"}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("missing.json", None, "no such file"),
        ("extra.ini", "[a]", "the name must end in .json, .toml, .yaml, .yml"),
        ("bad.json", '{"a": ', "not valid JSON.*line 1, column 7"),
        ("bad.toml", "a = = 1", "not valid TOML"),
        ("bad.yaml", "a: [1, 2", "not valid YAML.*line 1"),
        ("control.yaml", "a: \x00", "not valid YAML"),
        ("list.json", "[1]", "expected a mapping of names to values, got list"),
        ("number.yaml", "1: x", "names must be text, but 1 is int"),
        ("latin.json", b"\xff\xfe", "cannot be read"),
        (".json", "", "must end in"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str | bytes | None, problem: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    loaders: list[Callable[[], HiCacheConfig]] = [
        lambda: HiCacheConfig.load(file=path),
        lambda: build({EXTRA: f"@{path}"}),
    ]
    for load in loaders:
        with pytest.raises(ConfigError, match=problem) as caught:
            load()
        assert str(path) in str(caught.value)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        HiCacheConfig.load(file=tmp_path / "a.json")


def test_an_empty_yaml_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert HiCacheConfig.load(file=tmp_path / "empty.yaml") == HiCacheConfig()


def test_malformed_json_says_where_and_never_quotes_the_text() -> None:
    message = refusal(**{EXTRA: '{"password": "hunter2",}'})
    assert message.startswith(f"{EXTRA}: ")
    assert "is not valid JSON" in message
    assert "line 1, column" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("value", [3, None, ["a"], "[]", "3", "null"])
def test_extra_config_must_be_a_mapping(value: object) -> None:
    if value == "null" or value is None:
        assert build({EXTRA: value}).backend_config == {}
    else:
        assert "expected a mapping" in refusal(**{EXTRA: value})


def test_the_controllers_keys_are_taken_out_with_sglangs_defaults() -> None:
    assert ControllerKeys().model_dump() == {
        "prefetch_threshold": 256,
        "prefetch_timeout_base": 1.0,
        "prefetch_timeout_per_ki_token": 0.25,
        "hicache_storage_pass_prefix_keys": False,
        "tp_lcm_size": None,
    }
    extra = {"prefetch_threshold": 8, "prefetch_timeout_base": 2, "tp_lcm_size": 4, "path": "/x"}
    config = HiCacheConfig(hicache_storage_backend_extra_config=extra)
    assert config.controller_keys.prefetch_threshold == 8
    assert config.controller_keys.prefetch_timeout_base == 2.0
    assert config.backend_config == {"path": "/x"}
    assert config.hicache_storage_backend_extra_config == extra


def test_a_class_written_for_sglang_gets_tp_lcm_size() -> None:
    extra = {"tp_lcm_size": 4, "prefetch_threshold": 8, "class_name": "Theirs"}
    config = HiCacheConfig(
        hicache_storage_backend="dynamic", hicache_storage_backend_extra_config=extra
    )
    assert config.backend_config == {"tp_lcm_size": 4, "class_name": "Theirs"}


def test_a_bad_controller_key_is_named_with_its_place() -> None:
    message = refusal(**{EXTRA: {"prefetch_threshold": -1}})
    assert message.startswith(f"{EXTRA}.prefetch_threshold = -1: allowed: an integer of at least 0")


def test_the_config_does_not_share_the_callers_mapping() -> None:
    extra: dict[str, Any] = {"nested": {"a": 1}}
    config = HiCacheConfig(hicache_storage_backend_extra_config=extra)
    extra["nested"]["a"] = 2
    config.backend_config["nested"] = None
    assert config.backend_config == {"nested": {"a": 1}}


def test_none_by_name_takes_the_backend_of_a_file_away(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"hicache_storage_backend": "file"}')
    config = HiCacheConfig.load(flags={"hicache_storage_backend": "none"}, file=tmp_path / "a.json")
    assert config.hicache_storage_backend is None


# Frozen, equal, copied, shown


def test_it_is_frozen_and_copies_keep_everything() -> None:
    config = HiCacheConfig.load(flags={EXTRA: '{"prefetch_threshold": 3, "path": "/x"}'})
    with pytest.raises(ValueError, match="frozen"):
        config.page_size = 3
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config
        assert twin.sources == config.sources
        assert twin.backend_config == {"path": "/x"}
        assert twin.controller_keys.prefetch_threshold == 3
    assert config != HiCacheConfig()
    assert config != "config"


def test_no_secret_is_shown() -> None:
    config = HiCacheConfig(
        hicache_storage_backend_extra_config={
            "password": "hunter2",
            "url": "redis://me:hunter2@host:6379/0?password=hunter2",
            "nested": [{"secretAccessKey": "hunter2"}],
            "prefetch_timeout_per_ki_token": 0.5,
        }
    )
    for shown in (repr(config), str(config), repr(config.resolve())):
        assert "hunter2" not in shown
        assert "host:6379" in shown
        assert "0.5" in shown
    assert "hunter2" in str(config.backend_config)
    assert "hunter2" not in refusal(hicache_storage_backend="redis://me:hunter2@host")
