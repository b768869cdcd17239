"""Every command of SGLang's best practices, as docs/best-practices.md has it, does what it says."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from hicache_core.engine.model import LoadedModel
from tests.server.process import ServerProcess, server_process
from tests.server.tiny import ROOM, commands, tiny_server
from tests.servers.mooncake import running_mooncake

COMMANDS = commands()
PROMPT = [3 + n % 40 for n in range(330)]  # five whole pages of 64, and ten tokens
PAGES = 320.0
DISAGGREGATED = [name for name, flags in COMMANDS.items() if "--disaggregation-mode" in flags]
HOST_USED = "hicache_host_used_tokens"
HOST_TOTAL = "hicache_host_total_tokens"
BACKED_UP = "backuped_tokens_total"


def flags_of(name: str, **changes: str) -> list[str]:
    """The command's flags, with other values for those that this machine cannot have."""
    flags = list(COMMANDS[name])
    for flag, value in changes.items():
        flags[flags.index("--" + flag.replace("_", "-")) + 1] = value
    return flags


def test_the_table_has_every_command() -> None:
    assert len(COMMANDS) == 17
    assert len(DISAGGREGATED) == 2


@pytest.mark.anyio
async def test_without_the_flag_there_is_the_device_tier_alone(tiny_chat: LoadedModel) -> None:
    async with tiny_server(tiny_chat, ["--model-path", "tiny", *ROOM]) as s:
        await s.ask(PROMPT)
        assert (await s.ask(PROMPT))["cached_tokens_details"]["device"] == PAGES
        assert HOST_TOTAL not in await s.metrics()


@pytest.mark.anyio
async def test_the_flag_brings_the_host_tier(tiny_chat: LoadedModel) -> None:
    name = "--page-size 64, --enable-hierarchical-cache"
    async with tiny_server(tiny_chat, [*COMMANDS[name], *ROOM]) as s:
        assert (await s.metrics())[HOST_TOTAL] > 0
        assert (await s.info())["page_size"] == 64


@pytest.mark.anyio
async def test_the_ratio_is_of_the_device_pool(tiny_chat: LoadedModel) -> None:
    async with tiny_server(tiny_chat, [*COMMANDS["--hicache-ratio 2"], *ROOM]) as s:
        assert (await s.metrics())[HOST_TOTAL] == 2 * (await s.info())["max_total_num_tokens"]


@pytest.mark.anyio
async def test_a_size_overrides_the_ratio(tiny_chat: LoadedModel) -> None:
    flags = flags_of("--hicache-size 100", hicache_size="0.01")
    async with tiny_server(tiny_chat, [*flags, *ROOM]) as s:
        page_nbytes = s.engine.cache.snapshot().page_nbytes
        assert (await s.metrics())[HOST_TOTAL] == 10_000_000 // page_nbytes * 64
        assert "hicache_size overrides the ratio" in s.said


@pytest.mark.anyio
async def test_write_through_fills_host_pages_at_once(tiny_chat: LoadedModel) -> None:
    name = "--hicache-write-policy write_through"
    async with tiny_server(tiny_chat, [*COMMANDS[name], *ROOM]) as s:
        assert (await s.metrics())[HOST_USED] == 0
        await s.ask(PROMPT)
        await s.settle()
        metrics = await s.metrics()
        assert metrics[HOST_USED] == PAGES
        assert metrics['hicache_backup_tokens_total{pool="kv"}'] == PAGES


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "layout", "io_backend"),
    [
        ("--hicache-io-backend kernel", "page_first", "kernel"),
        ("--hicache-mem-layout page_first", "page_first", "kernel"),
        ("page_first with direct", "layer_first", "direct"),
        ("--hicache-mem-layout page_first_direct", "page_first_direct", "direct"),
        ("--hicache-mem-layout layer_first", "layer_first", "kernel"),
    ],
)
async def test_layout_and_io_backend_are_in_force(
    tiny_chat: LoadedModel, name: str, layout: str, io_backend: str
) -> None:
    async with tiny_server(tiny_chat, [*COMMANDS[name], *ROOM]) as s:
        info = await s.info()
        assert (info["hicache_mem_layout"], info["hicache_io_backend"]) == (layout, io_backend)
        assert ("using layer_first" in s.said) == (name == "page_first with direct")
        await s.ask(PROMPT)
        await s.settle()
        assert (await s.metrics())[HOST_USED] == PAGES


@pytest.mark.anyio
@pytest.mark.parametrize("policy", ["best_effort", "wait_complete", "timeout"])
async def test_prefetch_policies_after_a_restart(
    tiny_chat: LoadedModel, tmp_path: Path, policy: str
) -> None:
    extra = {"path": str(tmp_path), "prefetch_timeout_base": 60}
    flags = [
        *COMMANDS[f"--hicache-storage-prefetch-policy {policy}"],
        *ROOM,
        "--hicache-storage-backend-extra-config",
        json.dumps(extra),
    ]
    async with tiny_server(tiny_chat, flags) as s:
        first = await s.ask(PROMPT)
        await s.settle()
        assert (await s.metrics())[BACKED_UP] == PAGES
    async with tiny_server(tiny_chat, flags) as s:
        again = await s.ask(PROMPT)
        metrics = await s.metrics()
    assert again["output_ids"] == first["output_ids"]
    if policy == "best_effort":
        assert again["cached_tokens_details"]["storage"] in range(0, 321, 64)
    else:
        assert again["cached_tokens_details"]["storage"] == PAGES
        assert metrics['cached_tokens_total{cache_source="storage"}'] == PAGES


def asked(server: ServerProcess) -> dict[str, Any]:
    """``meta_info`` of a greedy answer to the prompt."""
    body = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    meta: dict[str, Any] = answer.raise_for_status().json()["meta_info"]
    return meta


def backed_up(server: ServerProcess, n_tokens: float = PAGES) -> None:
    """Waits until storage has acknowledged so much."""
    until = time.monotonic() + 60
    while server.metrics()[BACKED_UP] < n_tokens:
        assert time.monotonic() < until, "\n".join(server.lines)
        time.sleep(0.02)


def for_this_machine(name: str) -> list[str]:
    """The flags, with loopback, any free port, and ranks that the tiny model can be split over.

    The model is given elsewhere.
    """
    changes = {"host": "127.0.0.1", "port": "0", "tp": "2"}
    changes = {key: value for key, value in changes.items() if f"--{key}" in COMMANDS[name]}
    flags = flags_of(name, **changes)
    at = flags.index("--model-path")
    flags = flags[:at] + flags[at + 2 :] + ROOM
    return flags if "--enable-metrics" in flags else [*flags, "--enable-metrics"]


def hf3fs_environment(tmp_path: Path) -> dict[str, str]:
    """3FS's configuration, for an ordinary file system."""
    config = {"file_path_prefix": str(tmp_path / "kv"), "file_size": 1 << 24}
    (tmp_path / "hf3fs.json").write_text(json.dumps(config))
    return {"SGLANG_HICACHE_HF3FS_CONFIG_PATH": str(tmp_path / "hf3fs.json")}


@pytest.mark.full
def test_deployment_with_hf3fs(tiny_folder: Path, tmp_path: Path) -> None:
    """Tokens are backed up; SIGTERM drains; after a restart the prefix comes from storage."""
    flags, env = for_this_machine("Deployment with HF3FS"), hf3fs_environment(tmp_path)
    with server_process(tiny_folder, flags, env) as server:
        assert "rank 1 of 2 is process" in "\n".join(server.lines)
        assert asked(server)["cached_tokens"] == 0
        assert server.stop() == 0  # what is not durable yet is drained
    with server_process(tiny_folder, flags, env) as server:
        assert asked(server)["cached_tokens_details"]["storage"] == PAGES
        assert asked(server)["cached_tokens_details"]["device"] == PAGES
        assert server.metrics()['cached_tokens_total{cache_source="storage"}'] == PAGES
        assert server.stop() == 0


@pytest.mark.full
def test_deployment_with_mooncake(tiny_folder: Path, tmp_path: Path) -> None:
    with running_mooncake(tmp_path) as master:
        env = {
            "MOONCAKE_TE_META_DATA_SERVER": "P2PHANDSHAKE",
            "MOONCAKE_GLOBAL_SEGMENT_SIZE": str(64 << 20),
            "MOONCAKE_PROTOCOL": "tcp",
            "MOONCAKE_DEVICE": "",
            "MOONCAKE_MASTER": master.address,
            "MOONCAKE_LOCAL_HOSTNAME": "127.0.0.1",
        }
        with server_process(
            tiny_folder, for_this_machine("Deployment with Mooncake"), env
        ) as server:
            asked(server)
            backed_up(server)
            flushed = httpx.post(f"{server.url}/flush_cache", params={"timeout": 30}, timeout=60)
            assert flushed.status_code == 200
            assert asked(server)["cached_tokens_details"]["storage"] > 0
            assert server.stop() == 0


CUSTOM = """
from pathlib import Path
from hicache_core.storage.base import BackendConfig, StorageBackend

FOLDER = Path(__file__).parent / "objects"

class YourHiCacheClassName(StorageBackend):
    name = "custom_backend_name"
    api_version = 1
    Config = BackendConfig

    def open(self):
        FOLDER.mkdir(exist_ok=True)

    def _file(self, key):
        return FOLDER / key.replace("/", "_")

    def get(self, key):
        return self._file(key).read_bytes() if self.exists(key) else None

    def exists(self, key):
        return self._file(key).exists()

    def set(self, key, value):
        self._file(key).write_bytes(value)
"""


@pytest.fixture
def custom_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The module that the command names."""
    (tmp_path / "your_module_path.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "objects"
    sys.modules.pop("your_module_path", None)


@pytest.mark.anyio
async def test_a_dynamic_backend_is_loaded_and_gets_the_pages(
    tiny_chat: LoadedModel, custom_backend: Path
) -> None:
    async with tiny_server(tiny_chat, [*COMMANDS["Dynamic backend"], *ROOM]) as s:
        await s.ask(PROMPT)
        await s.settle()
        assert (await s.metrics())[BACKED_UP] == PAGES
        assert len(list(custom_backend.iterdir())) >= 5


@pytest.mark.full
def test_disaggregation(tiny_folder: Path, tmp_path: Path) -> None:
    """KV goes from one to the other; what is generated is backed up; both have the same tokens."""
    env = hf3fs_environment(tmp_path)
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as starters:
            both = [for_this_machine(name) for name in DISAGGREGATED]
            prefill, decode = starters.map(
                lambda flags: stack.enter_context(server_process(tiny_folder, flags, env)), both
            )
        assert "mlx5_0 has no effect" in "\n".join(prefill.lines)
        for node in (prefill, decode):
            assert "rank 1 of 2 is process" in "\n".join(node.lines)
        info = httpx.get(f"{prefill.url}/get_server_info").json()
        host, _, port = info["disaggregation_transfer_address"].rpartition(":")
        room = {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": 5}
        params = {"temperature": 0.0, "max_new_tokens": 340, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": params, **room}
        with ThreadPoolExecutor(1) as client:
            computing = client.submit(httpx.post, f"{prefill.url}/generate", json=body, timeout=60)
            answer = httpx.post(f"{decode.url}/generate", json=body, timeout=60).json()
            first = computing.result().json()
        assert answer["output_ids"][:1] == first["output_ids"]
        figures = httpx.get(f"{decode.url}/get_server_info").json()["disaggregation"]
        assert (figures["received"], figures["recomputed"]) == (1, 0)
        assert decode.stop() == 0  # what was generated is drained
        longer = {
            "input_ids": [*PROMPT, *answer["output_ids"]],
            "sampling_params": {**params, "max_new_tokens": 2},
        }
        again = httpx.post(f"{prefill.url}/generate", json=longer, timeout=60).json()
        assert again["meta_info"]["cached_tokens_details"]["storage"] >= 256
