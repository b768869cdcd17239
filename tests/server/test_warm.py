"""``POST /hicache/warm`` and ``hicache warm``: prompts come from storage to the host."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hicache_core.cli.main import cli
from hicache_core.server.access import Keys
from tests.engine.windowed_models import loaded_model
from tests.engine.world import prompt_of
from tests.server.test_access import bearer
from tests.server.test_admin import BACKEND, IDS, WAIT, attach, cached, settled
from tests.server.tiny import ROOM, tiny_server
from tests.server.world import Server, server

pytestmark = pytest.mark.anyio

WARM = "/hicache/warm"
BEST_EFFORT = WAIT | {"hicache_storage_prefetch_policy": "best_effort"}


async def stored_only(s: Server, path: Path) -> None:
    """Has the prompt in storage, and nowhere else."""
    assert (await s.client.put(BACKEND, json=attach(path))).status_code == 200
    await cached(s)
    await settled(s)
    assert (await s.client.post("/flush_cache", params={"timeout": 10})).status_code == 200


async def warm(s: Server, **body: Any) -> list[dict[str, Any]]:
    answer = await s.client.post(WARM, json=body)
    assert answer.status_code == 200, answer.text
    told: list[dict[str, Any]] = answer.json()["prompts"]
    return told


async def test_a_prompt_is_on_the_host_before_its_request_comes(tmp_path: Path) -> None:
    """The whole of it, the page of the last token too, and whatever the prefetch policy."""
    async with server(cache=BEST_EFFORT) as s:
        await stored_only(s, tmp_path)
        (told,) = await warm(s, input_ids=IDS)
        assert told == {"prompt_tokens": 12, "cached_tokens": 12, "loaded_tokens": 12}
        assert await cached(s) == {"device": 0, "host": 12, "storage": 0}
        (again,) = await warm(s, input_ids=IDS)
        assert again == {"prompt_tokens": 12, "cached_tokens": 12, "loaded_tokens": 0}


async def test_what_is_not_in_storage_is_said(tmp_path: Path) -> None:
    async with server(cache=WAIT) as s:
        (told,) = await warm(s, input_ids=IDS)
        assert (told["loaded_tokens"], told["reason"]) == (0, "no_storage")
        await stored_only(s, tmp_path)
        known, new = await warm(s, input_ids=[IDS, IDS[::-1]])
        assert known["loaded_tokens"] == 12
        assert (new["loaded_tokens"], new["reason"]) == (0, "absent")
        salted = await warm(s, input_ids=IDS, cache_salt="tenant-a")
        assert salted[0]["cached_tokens"] == 0


async def test_a_text_is_tokenized_as_in_a_request(tmp_path: Path) -> None:
    async with server(cache=WAIT) as s:
        assert (await s.client.put(BACKEND, json=attach(tmp_path))).status_code == 200
        text = "the quick brown fox jumps over the lazy dog"
        body = {"text": text, "sampling_params": {"max_new_tokens": 1}}
        asked = (await s.client.post("/generate", json=body)).json()
        await settled(s)
        await s.client.post("/flush_cache", params={"timeout": 10})
        (told,) = await warm(s, text=text)
        n_prompt = asked["meta_info"]["prompt_tokens"]
        assert told["prompt_tokens"] == n_prompt
        assert told["loaded_tokens"] == n_prompt // 4 * 4 > 0


@pytest.mark.parametrize(
    "body", [{}, {"text": "a", "input_ids": [1]}, {"input_ids": [10**6]}, {"texts": "a"}]
)
async def test_a_wrong_body_is_refused(body: dict[str, Any]) -> None:
    async with server() as s:
        assert (await s.client.post(WARM, json=body)).status_code == 400


async def test_only_the_operator_warms(tmp_path: Path) -> None:
    async with server(keys=Keys("the-api-key", "the-admin-key")) as s:
        for key, status in (("the-api-key", 403), ("the-admin-key", 200)):
            answer = await s.client.post(WARM, json={"input_ids": IDS}, headers=bearer(key))
            assert answer.status_code == status


class Forward(BaseHTTPRequestHandler):
    """A socket in front of the application, for the command."""

    answer: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status, text = self.answer(self.path, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def listening() -> Iterator[HTTPServer]:
    http = HTTPServer(("127.0.0.1", 0), type("Handler", (Forward,), {}))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


async def test_the_command_warms_a_server(tmp_path: Path, listening: HTTPServer) -> None:
    loop = asyncio.get_running_loop()
    async with server(cache=WAIT) as s:
        await stored_only(s, tmp_path)

        def answer(path: str, body: bytes) -> tuple[int, bytes]:
            asked = s.client.post(path, content=body)
            got = asyncio.run_coroutine_threadsafe(asked, loop).result(30)
            return got.status_code, got.content

        listening.RequestHandlerClass.answer = staticmethod(answer)  # type: ignore[attr-defined]
        url = f"127.0.0.1:{listening.server_port}"

        async def run(*arguments: str) -> tuple[int, str]:
            done = await asyncio.to_thread(CliRunner().invoke, cli, ["warm", url, *arguments])
            return done.exit_code, done.output

        ids = ",".join(map(str, IDS))
        status, out = await run("--prompt", ids)
        assert status == 0
        assert "12 of 12 tokens came from storage, the server has 12" in out
        assert "1 prompts, 3 pages" in out
        file = tmp_path / "prompts"
        file.write_text(f"[{ids}]\n[{','.join(map(str, IDS[::-1]))}]\na text\n")
        status, out = await run("--prompts", str(file), "--json")
        assert status == 1
        told = json.loads(out)["prompts"]
        assert [one["cached_tokens"] for one in told[:2]] == [12, 0]
        assert told[1]["reason"] == "absent"
        status, out = await run("--prompt", "1000000")
        assert (status, "does not exist in this model" in out) == (1, True)
        assert (await run())[0] == 2


def on(store: Path) -> list[str]:
    """The flags of a server with pages of 4 tokens in a file store."""
    extra = json.dumps({"path": str(store), "prefetch_threshold": 0})
    return [
        *("--model-path", "tiny", "--enable-hierarchical-cache", "--page-size", "4", *ROOM),
        *("--hicache-storage-backend", "file"),
        *("--hicache-storage-backend-extra-config", extra),
    ]


async def test_a_model_with_windows_is_moved_and_warmed(tmp_path: Path) -> None:
    """From the store of one server through an archive to the host of another, windows included."""
    model, ids = loaded_model("gemma2"), prompt_of(41)
    async with tiny_server(model, on(tmp_path / "one")) as s:
        expected = (await s.ask(ids))["output_ids"]
        await s.ask(prompt_of(41, seed=2))
        await s.settle()
    one, other = (json.dumps({"path": str(tmp_path / name)}) for name in ("one", "other"))
    archive, prompt = str(tmp_path / "prompt.tar"), ",".join(map(str, ids))
    run = CliRunner().invoke
    done = run(cli, ["export", "file", archive, "--config", one, "--prompt", prompt, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert len(told["namespaces"]) == 2
    assert told["prompts"] == [{"pages": 10, "stored": 10}]
    done = run(cli, ["import", archive, "file", "--config", other])
    assert done.exit_code == 0, done.output
    async with tiny_server(model, on(tmp_path / "other")) as s:
        answer = await s.client.post(WARM, json={"input_ids": ids})
        (warmed,) = answer.raise_for_status().json()["prompts"]
        assert warmed == {"prompt_tokens": 41, "cached_tokens": 40, "loaded_tokens": 40}
        meta = await s.ask(ids)
        assert meta["cached_tokens_details"] == {"device": 0, "host": 40, "storage": 0}
        assert meta["output_ids"] == expected
