"""Settings: what is accepted, what is refused, and that the README names them all."""

from __future__ import annotations

import re
from pathlib import Path

import hicache_redis
import pytest
from hicache_redis import RedisBackend, RedisConfig
from hicache_redis.config import split_address
from hicache_redis.errors import REPLIES
from pydantic import ValidationError

from hicache_core.plugin import manager as plugin_manager

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_plugin_hands_out_the_backend_of_its_name() -> None:
    assert hicache_redis.hicache_backends() == [RedisBackend]
    assert RedisBackend.name == "redis"


@pytest.mark.parametrize(
    ("settings", "address", "database", "credentials"),
    [
        ({}, ("127.0.0.1", 6379), 0, (None, None)),
        ({"url": "redis://kv.local:7000/3"}, ("kv.local", 7000), 3, (None, None)),
        ({"url": "redis://kv.local?db=4"}, ("kv.local", 6379), 4, (None, None)),
        ({"url": "redis://[::1]:7000"}, ("::1", 7000), 0, (None, None)),
        ({"url": "redis://u:p%40%2Fq@h"}, ("h", 6379), 0, ("u", "p@/q")),
        (
            {"url": "redis://u:p@h/1", "username": "v", "password": "q", "db": 2},
            ("h", 6379),
            2,
            ("v", "q"),
        ),
    ],
)
def test_a_url_is_read_and_single_settings_go_before_it(
    settings: dict[str, object],
    address: tuple[str, int],
    database: int,
    credentials: tuple[str | None, str | None],
) -> None:
    config = RedisConfig.model_validate(settings)
    assert config.address == address
    assert config.database == database
    assert config.credentials == credentials
    assert config.socket_path is None


def test_a_unix_url_names_its_socket() -> None:
    config = RedisConfig.model_validate({"url": "unix:///run/kv.sock?db=2"})
    assert (config.socket_path, config.database) == ("/run/kv.sock", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://h"}, "cannot be read"),
        ({"url": "unix://"}, "has no socket path"),
        ({"url": "redis://h?socket_timeout=3"}, "'socket_timeout'"),
        ({"hosts": "h"}, "hosts"),
        ({"sentinels": ["h"]}, "sentinel_master"),
        ({"sentinels": ["h"], "sentinel_master": "m", "cluster": True}, "exclude each other"),
        ({"nodes": ["h:1"]}, "set cluster to true"),
        ({"nodes": ["h:x"], "cluster": True}, "is not an address"),
        ({"url": "unix:///s", "cluster": True}, "one server"),
        ({"url": "redis://h/1", "cluster": True}, "no database 1"),
        ({"key_prefix": "{a}", "cluster": True}, "brace"),
        ({"tls_ca_file": "/ca.pem"}, "not rediss://"),
        ({"max_connections": 0}, "greater than or equal to 1"),
        ({"socket_timeout_s": 0}, "greater than 0"),
        ({"window_nbytes": "much"}, "is not a size"),
        ({"protocol": 4}, "2 or 3"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        RedisConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("text", "address"),
    [("h", ("h", 1)), ("h:7", ("h", 7)), ("[::1]:7", ("::1", 7)), ("[::1]", ("::1", 1)),
     ("::1", ("::1", 1))],
)  # fmt: skip
def test_addresses_may_leave_the_port_out(text: str, address: tuple[str, int]) -> None:
    assert split_address(text, 1) == address


@pytest.mark.parametrize("text", ["", ":7", "h:0", "h:65536", "h:seven"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        split_address(text, 1)


def test_settings_of_a_configuration_reach_the_backend() -> None:
    config = plugin_manager.backend_settings(RedisBackend, {"window_nbytes": "16MiB"})
    assert isinstance(config, RedisConfig)
    assert config.window_nbytes == 16 << 20


def test_the_readme_lists_every_setting_with_its_default_and_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    listed = {name: (default, text) for name, default, text in rows}
    fields = RedisConfig.model_fields
    assert sorted(listed) == sorted(fields)
    for name, field in fields.items():
        default, text = listed[name]
        assert text == field.description, name
        value = field.get_default()
        value = value.get_secret_value() if name == "url" else value
        assert default.strip("`") == _shown(name, value), name


def _shown(name: str, value: object) -> str:
    """A default as the README writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and name.endswith("_nbytes"):
        return f"{value >> 20}MiB"
    return "–" if value is None else "none" if value == () else str(value)


def test_the_readme_explains_every_error_reply_in_the_table() -> None:
    for code in REPLIES:
        assert f"`{code}`" in README, code
