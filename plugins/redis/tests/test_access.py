"""Credentials, rights, TLS; and that no secret is ever shown."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hicache_redis import RedisBackend, RedisConfig
from pydantic import ValidationError

from hicache_core.errors import BackendDenied, BackendUnavailable, ConfigError, HiCacheError
from hicache_core.plugin import manager as plugin_manager
from plugins.redis.tests.emulation import emulated
from plugins.redis.tests.pages import blank, filled, holds, keys_of
from tests.servers.process import certificate
from tests.servers.valkey import REDIS, Valkey, running

Open = Callable[..., RedisBackend]
SECRET = "hunter2-Tr0ub4dor"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Valkey]:
    """A server with a password and with users of few rights; the README's ACL line among them."""
    with running("--requirepass", SECRET, password=SECRET) as server:
        server.call(*readme_acl())
        server.call(*f"ACL SETUSER reader on >{SECRET} ~hicache:* +@read +@connection".split())
        server.call(*f"ACL SETUSER elsewhere on >{SECRET} ~other:* +@all".split())
        yield server


def readme_acl() -> list[str]:
    """The ACL line of the README, with our password."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("ACL SETUSER")]
    return line.replace("PASSWORD", SECRET).split()


def test_the_rights_of_the_readme_are_enough_for_everything(guarded: Valkey, opened: Open) -> None:
    backend = opened(url=guarded.url, username="hicache", password=SECRET)
    keys = keys_of(4, "acl")
    assert backend.batch_set(keys, [filled(key, (64, 100)) for key in keys]) == 4
    pages = [blank((64, 100)) for _ in keys]
    assert backend.batch_get(keys, pages) == 4
    assert all(holds(key, page) for key, page in zip(keys, pages, strict=True))
    assert backend.batch_exists(keys) == 4
    assert sorted(backend.list_keys("")) == sorted(keys)
    assert {finding.level for finding in backend.diagnose()} <= {"ok", "warning"}
    assert backend.pin(keys, 60) == 4
    assert sum(backend.usage().values()) == 4 * 164
    backend.delete(keys[:1])
    assert backend.clear("") == 3


def test_the_password_may_stand_in_the_url(guarded: Valkey, opened: Open) -> None:
    port = guarded.port
    assert not opened(url=f"redis://:{SECRET}@127.0.0.1:{port}").exists("k")
    assert not opened(url=f"redis://hicache:{SECRET}@127.0.0.1:{port}", protocol=3).exists("k")
    socket = f"unix://hicache:{SECRET}@{guarded.socket_path}"
    assert not opened(url=socket).exists("k")


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize(
    ("user", "password"),
    [
        (None, None),
        (None, f"{SECRET}x"),
        ("nobody", SECRET),
        ("reader", SECRET),
        ("elsewhere", SECRET),
    ],
)
def test_wrong_credentials_and_missing_rights_fail_at_open_and_show_no_secret(
    guarded: Valkey,
    opened: Open,
    caplog: pytest.LogCaptureFixture,
    user: str | None,
    password: str | None,
    protocol: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(BackendDenied) as caught:
        opened(url=guarded.url, username=user, password=password, protocol=protocol)
    assert f"127.0.0.1:{guarded.port}" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_a_password_for_a_server_without_one_is_refused(own_server: Valkey, opened: Open) -> None:
    with pytest.raises(BackendDenied) as caught:
        opened(url=own_server.url, username="hicache", password=SECRET)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_server_that_quotes_the_password_back_is_not_repeated(
    opened: Open, protocol: int
) -> None:
    """As an old server does with a command that it does not know."""
    quote = f"-ERR unknown command 'HELLO', with args beginning with: 'AUTH' '{SECRET}'\r\n"
    listener, thread = emulated([quote.encode()])
    with listener, pytest.raises(HiCacheError, match="unknown command") as caught:
        opened(
            url=f"redis://127.0.0.1:{listener.getsockname()[1]}", password=SECRET, protocol=protocol
        )
    thread.join()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_rights_taken_away_later_are_an_error_not_a_miss(guarded: Valkey, opened: Open) -> None:
    user = f"ACL SETUSER later on >{SECRET} ~hicache:* +@all".split()
    guarded.call(*user)
    backend = opened(url=guarded.url, username="later", password=SECRET, batch_connections=1)
    guarded.call("ACL", "SETUSER", "later", "-get", "-set")
    with pytest.raises(BackendDenied, match="NOPERM"):
        backend.batch_get(["k"], [blank((4,))])
    with pytest.raises(BackendDenied, match="NOPERM"):
        backend.set("k", b"x")


@pytest.mark.parametrize(
    "settings",
    [
        {"url": f"redis://user:{SECRET}@host:6379/0"},
        {"password": SECRET},
        {"sentinels": ["h:1"], "sentinel_master": "m", "sentinel_password": SECRET},
    ],
)
def test_a_config_shows_no_secret(settings: dict[str, object]) -> None:
    config = RedisConfig.model_validate(settings)
    shown = [repr(config), str(config), config.model_dump_json(), repr(config.model_dump())]
    assert SECRET not in " ".join([*shown, config.shown_url])
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "settings",
    [
        {"url": f"https://user:{SECRET}@host"},
        {"url": f"redis://user:{SECRET}@host:port"},
        {"url": f"redis://user:{SECRET}@host?password={SECRET}&timeout=3"},
        {"url": f"redis://user:{SECRET}/oops@host:1"},
        {"url": {"password": SECRET}},
        {"password": [SECRET]},
        {"passwort": SECRET},
        {"url": f"redis://:{SECRET}@host", "cluster": "maybe"},
        {"url": f"unix://:{SECRET}@/s.sock", "cluster": True},
    ],
)
def test_an_invalid_config_is_told_without_its_secrets(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        RedisConfig.model_validate(settings)
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError) as told:
        plugin_manager.backend_settings(RedisBackend, settings)
    assert SECRET not in "".join(traceback.format_exception(told.value))


def test_an_unreachable_server_is_told_without_the_secrets_of_its_url(opened: Open) -> None:
    with pytest.raises(HiCacheError) as caught:
        opened(url=f"redis://user:{SECRET}@127.0.0.1:1")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Valkey, Path]]:
    """A TLS server and the certificate that it shows."""
    if REDIS is None:
        pytest.skip("no redis-server with TLS here; apt-get install redis-server")
    cert, key = certificate(tmp_path_factory.mktemp("tls"))
    options = ("--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-port", "0",
               "--tls-ca-cert-file", str(cert), "--tls-auth-clients", "optional")  # fmt: skip
    with running(*options, binary=REDIS) as server:
        server.call("CONFIG", "SET", "port", "0")
        server.call("CONFIG", "SET", "tls-port", str(server.port))
        yield server, cert


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("shape", [(64, 100), (64, *[1000] * 200), (64, 3_000_000)])
def test_pages_come_back_over_tls(
    tls: tuple[Valkey, Path], opened: Open, shape: tuple[int, ...], host: str
) -> None:
    server, cert = tls
    backend = opened(url=f"rediss://{host}:{server.port}", tls_ca_file=cert)
    keys = keys_of(6, f"tls {shape}")
    assert backend.batch_set(keys, [filled(key, shape) for key in keys]) == 6
    backend.set(keys[4], b"of another length" * 9999)
    pages = [blank(shape) for _ in keys]
    assert backend.batch_get(keys, pages) == 4
    assert all(holds(key, page) for key, page in zip(keys[:4], pages, strict=False))
    assert backend.batch_exists(keys) == 6
    assert backend.stats()["connections_opened"] <= 2  # late session tickets close none


def test_tls_checks_the_server_unless_told_not_to(tls: tuple[Valkey, Path], opened: Open) -> None:
    server, cert = tls
    url = f"rediss://127.0.0.1:{server.port}"
    with pytest.raises(BackendUnavailable, match="certificate verify failed"):
        opened(url=url)
    opened(url=url, tls_verify=False).set("k", b"x")
    key = cert.with_name("key.pem")
    opened(url=url, tls_ca_file=cert, tls_cert_file=cert, tls_key_file=key).set("k", b"x")
    with pytest.raises(BackendUnavailable):
        opened(url=f"redis://127.0.0.1:{server.port}", socket_timeout_s=0.5)


def test_a_frozen_server_is_a_timeout_over_tls_too(tls: tuple[Valkey, Path], opened: Open) -> None:
    server, cert = tls
    url = f"rediss://127.0.0.1:{server.port}"
    backend = opened(url=url, tls_ca_file=cert, socket_timeout_s=0.2)
    server.freeze()
    try:
        with pytest.raises(TimeoutError):
            backend.get("k")
        with pytest.raises(TimeoutError):
            backend.set("k", bytes(1 << 25))
    finally:
        server.thaw()
    backend.set("k", b"x")
    assert backend.get("k") == b"x"
