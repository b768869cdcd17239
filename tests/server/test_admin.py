"""What the operator does while requests run: flushing, and changing the storage backend."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from hicache_core.config.settings import HiCacheConfig
from hicache_core.disaggregation.roles import Role, RoleSettings
from hicache_core.kv_transfer.base import TransferContext
from hicache_core.kv_transfer.peers import PeerConfig
from hicache_core.kv_transfer.tcp import TcpTransfer
from hicache_core.server.access import Keys
from hicache_core.testing.transfer_kit import memory_of, spec_of
from tests.server.tiny import parsed
from tests.server.world import Server, server

pytestmark = pytest.mark.anyio

IDS = list(range(3, 15))
BACKEND = "/hicache/storage-backend"
FIRST = {"prefetch_threshold": 0}
WAIT = {
    "hicache_storage_prefetch_policy": "wait_complete",
    "hicache_storage_backend_extra_config": FIRST,
}


async def cached(s: Server) -> dict[str, int]:
    body = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 1}}
    answer = (await s.client.post("/generate", json=body)).json()
    details: dict[str, int] = answer["meta_info"]["cached_tokens_details"]
    return details


async def settled(s: Server) -> None:
    """Returns when all that was accepted is in the store."""
    assert await asyncio.to_thread(s.engine.call, lambda cache: cache.flush(10.0), 20.0)


def attach(path: Path, **more: Any) -> dict[str, Any]:
    extra = json.dumps({"path": str(path)} | more)
    return {
        "hicache_storage_backend": "file",
        "hicache_storage_backend_extra_config_json": extra,
        "hicache_write_policy": "write_through",
    }


async def test_flush_empties_device_and_host_but_not_storage(tmp_path: Path) -> None:
    async with server(cache=WAIT) as s:
        assert (await s.client.put(BACKEND, json=attach(tmp_path))).status_code == 200
        await cached(s)
        assert await cached(s) == {"device": 12, "host": 0, "storage": 0}
        await settled(s)
        flushed = await s.client.post("/flush_cache", params={"timeout": 10})
        assert flushed.status_code == 200
        # The page with the prompt's last token is computed anyway, so it is not fetched.
        assert await cached(s) == {"device": 0, "host": 0, "storage": 8}


async def test_a_backend_comes_is_shown_is_cleared_and_goes(tmp_path: Path) -> None:
    async with server(cache=WAIT) as s:
        assert (await s.client.get(BACKEND)).json()["hicache_storage_backend"] is None
        assert (await s.client.post(f"{BACKEND}/clear")).status_code == 400
        assert (await s.client.put(BACKEND, json=attach(tmp_path))).status_code == 200
        shown = (await s.client.get(BACKEND)).json()
        assert shown["hicache_storage_backend"] == "file"
        assert shown["hicache_storage_backend_extra_config"]["path"] == str(tmp_path)
        assert shown["backends"][0]["breaker"] == "closed"
        await cached(s)
        await settled(s)
        assert (await s.client.post(f"{BACKEND}/clear")).status_code == 200
        await s.client.get("/flush_cache", params={"timeout": 10})
        assert await cached(s) == {"device": 0, "host": 0, "storage": 0}
        assert (await s.client.delete(BACKEND)).status_code == 200
        assert (await s.client.get(BACKEND)).json()["hicache_storage_backend"] is None


async def test_policies_may_change_with_the_backend(tmp_path: Path) -> None:
    async with server(cache=WAIT) as s:
        change = attach(tmp_path, prefetch_threshold=13) | {
            "hicache_write_policy": "write_back",
            "hicache_storage_prefetch_policy": "best_effort",
        }
        assert (await s.client.put(BACKEND, json=change)).status_code == 200
        shown = (await s.client.get(BACKEND)).json()
        assert shown["hicache_write_policy"] == "write_back"
        assert shown["hicache_storage_prefetch_policy"] == "best_effort"
        assert shown["hicache_storage_backend_extra_config"]["prefetch_threshold"] == 13
        await cached(s)
        await settled(s)
        assert s.engine.cache.snapshot().counters["backup_tokens"] == 0

        write_through = attach(tmp_path)
        assert (await s.client.put(BACKEND, json=write_through)).status_code == 200
        shown = (await s.client.get(BACKEND)).json()
        assert shown["hicache_storage_prefetch_policy"] == "best_effort"  # as nobody named it
        assert shown["hicache_storage_backend_extra_config"]["prefetch_threshold"] == 13
        await cached(s)
        await settled(s)
        assert s.engine.cache.snapshot().counters["backup_tokens"] == 12
        await s.client.get("/flush_cache", params={"timeout": 10})
        # 12 tokens could come from storage: fewer than the threshold.
        assert await cached(s) == {"device": 0, "host": 0, "storage": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hicache_storage_backend": "fil"}, "fil"),
        ({"hicache_storage_backend": "none"}, "DELETE"),
        ({"hicache_storage_backend_extra_config_json": "{"}, "JSON"),
        ({"hicache_storage_backend_extra_config_json": '{"path": "/proc/nowhere"}'}, "nowhere"),
        ({"hicache_write_policy": "write_sometimes"}, "write_through"),
        ({"hicache_storage_prefetch_policy": "never"}, "wait_complete"),
        ({"hicache_storage_backend_extra_config_json": '{"load_back_threshold": 9}'}, "threshold"),
    ],
)
async def test_what_cannot_be_attached_is_400_and_changes_nothing(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    async with server(cache=WAIT) as s:
        await s.client.put(BACKEND, json=attach(tmp_path))
        before = (await s.client.get(BACKEND)).json()
        refused = await s.client.put(BACKEND, json=attach(tmp_path) | change)
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]
        assert (await s.client.get(BACKEND)).json() == before


DYNAMIC = {"backend_name": "x", "module_path": "nowhere_at_all", "class_name": "X"}


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("dynamic", DYNAMIC),
        ("chain", {"links": [{"backend": "memory"}, {"backend": "dynamic", "config": DYNAMIC}]}),
    ],
)
async def test_a_class_is_loaded_by_name_only_for_who_knows_the_admin_key(
    name: str, extra: dict[str, Any]
) -> None:
    body = {
        "hicache_storage_backend": name,
        "hicache_storage_backend_extra_config_json": json.dumps(extra),
    }
    async with server(cache=WAIT) as s:
        assert (await s.client.put(BACKEND, json=body)).status_code == 403
    async with server(cache=WAIT, keys=Keys(admin="key")) as s:
        headers = {"authorization": "Bearer key"}
        tried = await s.client.put(BACKEND, json=body, headers=headers)
        assert tried.status_code == 400
        assert "nowhere_at_all" in tried.json()["error"]["message"]


async def test_secrets_of_a_backend_are_masked(tmp_path: Path) -> None:
    extra = {"path": str(tmp_path), "guard": {}, "prefetch_threshold": 0}
    cache = {**WAIT, "hicache_storage_backend": "file"}
    cache["hicache_storage_backend_extra_config"] = extra
    async with server(cache=cache) as s:
        body = attach(tmp_path, password="hush")
        refused = await s.client.put(BACKEND, json=body)
        assert refused.status_code == 400
        assert "hush" not in refused.text


@pytest.mark.parametrize("timeout", ["-1", "nan", "inf", "x", "1e9"])
async def test_a_flush_waits_a_number_of_seconds(timeout: str) -> None:
    async with server() as s:
        assert (await s.client.get("/flush_cache", params={"timeout": timeout})).status_code == 400


async def test_what_is_not_there_is_404_in_the_same_shape() -> None:
    async with server() as s:
        for method, path in (
            ("GET", "/nothing"),
            ("GET", "/v1/models/other"),
            ("GET", "/generate"),
        ):
            answer = await s.client.request(method, path)
            assert answer.status_code in (404, 405)
            assert answer.json()["error"]["message"]


async def test_info_tells_what_clients_of_sglang_look_for() -> None:
    async with server(served_model_name="x") as s:
        info = (await s.client.get("/get_server_info")).json()
        assert (await s.client.get("/server_info")).json().keys() == info.keys()
        assert info["page_size"] == 4
        assert info["max_total_num_tokens"] > 0
        assert "last_gen_throughput" in info["internal_states"][0]
        model = (await s.client.get("/get_model_info")).json()
        assert model["model_path"] == "somewhere"
        assert model["is_generation"] is True
        models = (await s.client.get("/v1/models")).json()
        assert models["data"][0]["id"] == "echo"
        assert (await s.client.get("/v1/models/echo")).json() == models["data"][0]


async def test_info_tells_where_each_setting_came_from(tmp_path: Path) -> None:
    flags = ["--page-size", "4", "--hicache-size", "1", "--enable-hierarchical-cache"]
    cache = parsed(["--model-path", "tiny", *flags]).cache
    async with server(cache=cache) as s:
        sources = (await s.client.get("/get_server_info")).json()["setting_sources"]
        assert set(sources) == set(HiCacheConfig.model_fields)
        assert sources["page_size"] == "flag --page-size"
        assert sources["hicache_ratio"] == "compatibility rule"
        assert sources["hicache_io_backend"] == "default"
        refused = await s.client.put(
            BACKEND, json=attach(tmp_path) | {"hicache_write_policy": "never"}
        )
        assert "(from PUT /hicache/storage-backend)" in refused.json()["error"]["message"]


async def test_health_names_a_request_that_makes_no_progress() -> None:
    async with server() as s:
        s.engine.stalled = "request r has made no progress for 301 s"
        answer = await s.client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == s.engine.stalled
        s.engine.stalled = ""
        assert (await s.client.get("/health")).status_code == 200


async def test_health_generates_without_a_trace_in_others_caches() -> None:
    async with server() as s:
        assert (await s.client.get("/health")).json() == {"status": "ok"}
        assert (await s.client.get("/health_generate")).status_code == 200
        s.engine.fails = "stuck"
        assert (await s.client.get("/health_generate")).status_code == 500
        s.engine.close()
        assert (await s.client.get("/health")).status_code == 503
        assert (await s.client.post("/generate", json={"input_ids": [3]})).status_code == 503


async def test_health_tells_that_nobody_can_fetch_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TcpTransfer, "_accept", lambda _: None)  # the listener's thread ends
    transfer = TcpTransfer(PeerConfig(), TransferContext(memory_of(spec_of(), None)))
    role = Role(RoleSettings("prefill"))
    async with server() as s:
        s.service.role = role
        assert (await s.client.get("/health")).status_code == 200, "it is not open yet"
        transfer.open()
        role._transfer = transfer
        while not transfer.fault:
            await asyncio.sleep(0.01)
        answer = await s.client.get("/health")
        assert answer.status_code == 503
        assert "KV transfers: the listener has ended" in answer.text
        transfer.close()
        assert (await s.client.get("/health")).status_code == 200


async def test_what_the_get_shows_the_put_takes_and_nothing_unknown(tmp_path: Path) -> None:
    async with server() as s:
        path = "/hicache/storage-backend"
        body = {
            "hicache_storage_backend": "file",
            "hicache_storage_backend_extra_config": {"path": str(tmp_path / "kv")},
        }
        assert (await s.client.put(path, json=body)).status_code == 200
        shown = (await s.client.get(path)).json()
        assert shown["hicache_storage_backend_extra_config"]["path"] == str(tmp_path / "kv")
        assert (await s.client.put(path, json=shown)).status_code == 200
        for wrong, said in (
            ({"extra_config": {}}, "extra_config: there is no such field"),
            ({"hicache_storage_backend_extra_config_json": "{}"}, "not both"),
            ({"hicache_storage_backend_extra_config": {"password": "***"}}, "secret itself"),
        ):
            refused = await s.client.put(path, json={**body, **wrong})
            assert refused.status_code == 400
            assert said in refused.json()["error"]["message"]
