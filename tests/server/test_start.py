"""What an operator sees: errors before a model is loaded, a summary, a line for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path

import pytest

from hicache_core.build.start_check import check_start
from hicache_core.cli.main import main
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import EXTRA
from hicache_core.errors import BackendUnavailable, ConfigError, NotEnoughMemory
from hicache_core.server.access import Keys
from hicache_core.server.summary import summary
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.types import BackendContext
from tests.server.process import server_process
from tests.server.tiny import parsed
from tests.server.world import server

FILE = ["--enable-hierarchical-cache", "--hicache-storage-backend", "file"]
EXTRA_FLAG = "--hicache-storage-backend-extra-config"
URL = "http://127.0.0.1:1"


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return port


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What ``hicache serve`` says when the model is not there either."""
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--model-path", "/nowhere", "--port", "0", *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "/nowhere" not in error
    return error


@pytest.mark.parametrize("name", ["redis", "s3", "mooncake"])
def test_a_store_that_cannot_be_reached_is_an_error_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], free_port: int, name: str
) -> None:
    settings = {
        "redis": {"url": f"redis://127.0.0.1:{free_port}"},
        "s3": {
            "endpoint_url": f"http://127.0.0.1:{free_port}",
            "bucket": "b",
            "access_key_id": "a",
            "secret_access_key": "b",
            "retry_s": 0,
        },
        "mooncake": {"master_server_address": f"127.0.0.1:{free_port}"},
    }[name]
    flags = [*FILE[:2], name, EXTRA_FLAG, json.dumps(settings)]
    assert str(free_port) in refusal(capsys, *flags)


def test_so_is_one_behind_another_in_a_chain(free_port: int, tmp_path: Path) -> None:
    away = {"backend": "redis", "config": {"url": f"redis://127.0.0.1:{free_port}"}}
    near = {"backend": "file", "config": {"path": str(tmp_path / "kv")}}
    for links in ([near, away], [away, near]):
        config = HiCacheConfig(hicache_storage_backend="chain", **{EXTRA: {"links": links}})
        with pytest.raises(BackendUnavailable, match=str(free_port)):
            check_start(config)
    assert not (tmp_path / "kv").exists()


def test_a_folder_that_cannot_be_made_is_too_and_one_that_can_is_not_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = json.dumps({"path": str(tmp_path / "gone" / "kv")})
    assert "gone is not a directory" in refusal(capsys, *FILE, EXTRA_FLAG, wrong)
    right = {"path": str(tmp_path / "kv")}
    check_start(HiCacheConfig(hicache_storage_backend="file", **{EXTRA: right}))
    assert not (tmp_path / "kv").exists()


def test_a_store_that_is_only_read_must_be_there_and_needs_no_right_to_write(
    tmp_path: Path,
) -> None:
    only_read = {"path": str(tmp_path / "kv"), "read_only": True}
    config = HiCacheConfig(hicache_storage_backend="file", **{EXTRA: only_read})
    with pytest.raises(BackendUnavailable, match="kv"):
        check_start(config)
    backend = FileBackend(FileConfig(path=tmp_path / "kv"), BackendContext("0" * 16))
    backend.open()
    backend.close()
    check_start(config)
    link = {"backend": "file", "config": {"path": str(tmp_path / "kv")}, "read_only": True}
    links = HiCacheConfig(hicache_storage_backend="chain", **{EXTRA: {"links": [link]}})
    (tmp_path / "kv").chmod(0o500)
    check_start(links)


def test_a_host_pool_beyond_the_memory_is_an_error_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--enable-hierarchical-cache", "--hicache-size", "1000000"]
    assert "the host pool needs 1000000.00 GB" in refusal(capsys, *flags)
    check_start(HiCacheConfig(hicache_size=1e6, enable_hierarchical_cache=False))


def test_each_rank_needs_memory_of_its_own() -> None:
    with pytest.raises(NotEnoughMemory, match="host pool of 2 ranks needs 200000"):
        check_start(HiCacheConfig(hicache_size=1e5), n_ranks=2)


def test_a_taken_port_of_the_status_server_is_too(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refusal(capsys, "--hicache-status-port", port)
        with pytest.raises(ConfigError, match="hicache_status_port"):
            check_start(HiCacheConfig(hicache_status_port=port))


def test_the_summary_has_tiers_storage_and_addresses(tmp_path: Path) -> None:
    async def run(**cache: object) -> str:
        async with server(cache=cache, enable_metrics=True) as here:
            return "\n".join(summary(here.service, URL))

    store = {"path": str(tmp_path / "kv")}
    said = asyncio.run(run(hicache_storage_backend="file", hicache_status_port=0, **{EXTRA: store}))
    assert "context 512 tokens, pages of 4 tokens" in said
    assert "device tier: 640 tokens, 10,240 bytes" in said
    assert "host tier: 1,280 tokens, 20,480 bytes; write_through" in said
    assert "storage tier: file, namespace " in said
    assert f"page {URL}/hicache/\nmetrics {URL}/metrics\nstatus server http://127.0.0.1:" in said
    plain = asyncio.run(run(enable_hierarchical_cache=False))
    assert "host tier: none (--enable-hierarchical-cache adds it)\nstorage tier: none" in plain


def test_the_namespace_of_the_summary_is_the_stores_own(tmp_path: Path) -> None:
    async def run() -> None:
        async with server(
            cache={"hicache_storage_backend": "file", EXTRA: {"path": str(tmp_path / "kv")}}
        ) as here:
            said = "\n".join(summary(here.service, URL))
            here.engine.call(lambda cache: cache.flush(20.0), 30.0)
            (backend,) = here.engine.cache.snapshot().backends
            tier = here.engine.cache.parts.storage
            assert tier is not None
            assert tier.current is not None
            assert f"{backend.name}, namespace {tier.current.namespace}; prefetch" in said

    asyncio.run(run())


def test_each_request_is_a_line_once_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    body = {
        "input_ids": list(range(1, 20)),
        "rid": "mine\nforged",
        "sampling_params": {"max_new_tokens": 2},
    }

    async def run(*, log_requests: bool) -> list[str]:
        caplog.clear()
        async with server(log_requests=log_requests) as here:
            for _ in range(2):
                (await here.client.post("/generate", json=body)).raise_for_status()
            (await here.client.get("/health_generate")).raise_for_status()
            await asyncio.sleep(0)
        return [record.getMessage() for record in caplog.records if "request" in record.message]

    with caplog.at_level(logging.INFO, "hicache_core.server.request_log"):
        first, second = asyncio.run(run(log_requests=True))
        assert asyncio.run(run(log_requests=False)) == []
    words = "prompt 19 tokens: device 0, host 0, storage 0, computed 19; answer 2 tokens"
    assert first.startswith("request 'mine\\nforged': length; ")
    assert words in first
    assert "first token " in second
    assert "\n" not in first + second


def test_the_address_leads_to_the_page_also_without_a_key() -> None:
    async def run() -> None:
        for keys in (Keys(), Keys(api="for-all", admin="for-one")):
            async with server(keys=keys) as here:
                answer = await here.client.get("/", follow_redirects=True)
                assert answer.status_code == 200
                assert str(answer.url).endswith("/hicache/")
                assert "<title>HiCache</title>" in answer.text

    asyncio.run(run())


def test_the_page_learns_which_model_is_served() -> None:
    async def run() -> None:
        async with server() as here:
            for path in ("/hicache/engine", "/hicache/status"):
                shown = (await here.client.get(path)).json()
                assert shown.get("engine", shown)["model"] == "echo"

    asyncio.run(run())


def test_log_requests_is_a_flag_with_a_meaning() -> None:
    settings = parsed(["--model-path", "tiny", "--log-requests"])
    assert settings.log_requests
    assert settings.without_effect == ()


def test_a_real_server_says_all_this_before_it_says_where_it_serves(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "hicache.toml"
    config.write_text(
        'page_size = 16\nenable_hierarchical_cache = true\nhicache_storage_backend = "file"\n'
        f'[{EXTRA}]\npath = "{tmp_path / "kv"}"\n'
    )
    flags = ["--max-total-tokens", "1024", "--enable-metrics"]
    with server_process(tiny_folder, flags, {"HICACHE_CONFIG": str(config)}) as here:
        said = "\n".join(here.lines)
        assert "pages of 16 tokens" in said
        assert "hicache: device tier: 1,024 tokens, " in said
        assert "hicache: storage tier: file, namespace " in said
        assert f"hicache: metrics {here.url}/metrics" in said
        assert here.lines[-1].startswith("hicache: serves ")
