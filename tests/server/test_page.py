"""The page on the server: open files, guarded data, and what happened in it."""

from __future__ import annotations

import asyncio

from hicache_core.server.access import Keys
from tests.server.world import server

KEYS = Keys(api="for-all", admin="for-one")
DATA = ("/hicache/history", "/hicache/requests", "/hicache/tree", "/hicache/engine")


def test_the_page_and_its_files_need_no_key_and_its_data_does() -> None:
    async def run() -> None:
        async with server(keys=KEYS) as here:
            for path in ("/hicache/", "/hicache/app.js", "/hicache/page.css", "/hicache/icon.svg"):
                answer = await here.client.get(path)
                assert answer.status_code == 200, path
                assert "default-src 'self'" in answer.headers["content-security-policy"]
            for path in DATA:
                assert (await here.client.get(path)).status_code == 401, path
                tenant = {"Authorization": "Bearer for-all"}
                assert (await here.client.get(path, headers=tenant)).status_code == 403, path
                operator = {"Authorization": "Bearer for-one"}
                assert (await here.client.get(path, headers=operator)).status_code == 200, path

    asyncio.run(run())


def test_the_page_shows_the_requests_that_were_served_and_how_long_they_took() -> None:
    async def run() -> None:
        async with server() as here:
            body = {"input_ids": list(range(1, 20)), "sampling_params": {"max_new_tokens": 2}}
            assert (await here.client.post("/generate", json=body)).status_code == 200
            (record,) = (await here.client.get("/hicache/requests")).json()["requests"]
            assert record["n_tokens"] == 19
            assert record["total_s"] >= 0
            tree = (await here.client.get("/hicache/tree")).json()
            assert tree["picture"]["n_nodes"] >= 0
            assert "waiting" in (await here.client.get("/hicache/engine")).json()

    asyncio.run(run())
