"""``hicache attach``, ``detach`` and ``flush`` against the real application behind a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner, Result

from hicache_core.cli.main import cli
from hicache_core.server.access import Keys
from tests.server.test_admin import cached, settled
from tests.server.world import Server, server
from tests.servers.process import free_port

pytestmark = pytest.mark.anyio

ADMIN = "an-admin-key-of-these-tests"


@contextlib.asynccontextmanager
async def listening(**options: Any) -> AsyncIterator[tuple[Server, str]]:
    """A server, and its address without a scheme."""
    async with server(**options) as s, on_a_port(s.app) as address:
        yield s, address


@contextlib.asynccontextmanager
async def on_a_port(app: Any) -> AsyncIterator[str]:
    """An application behind a socket of its own; host and port."""
    front = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(front._serve([listener]))
        while not front.started:
            await asyncio.sleep(0.01)
        try:
            yield "{}:{}".format(*listener.getsockname()[:2])
        finally:
            front.should_exit = True
            await running


async def run(*words: str, **environ: str) -> Result:
    """Runs a command on another thread: the server has this one."""
    return await asyncio.to_thread(CliRunner(env=environ).invoke, cli, words)


async def test_a_store_comes_and_goes_and_the_tiers_are_emptied(tmp_path: Path) -> None:
    async with listening() as (s, address):
        config = json.dumps({"path": str(tmp_path / "kv"), "prefetch_threshold": 0})
        policy = ["--hicache-storage-prefetch-policy", "wait_complete"]
        attached = await run("attach", "file", address, "--config", config, *policy)
        assert (attached.exit_code, attached.output) == (0, "HiCache storage backend attached.\n")
        await cached(s)
        await settled(s)
        flushed = await run("flush", f"http://{address}/", "--timeout", "10")
        assert (flushed.exit_code, flushed.output) == (0, "Cache flushed.\n")
        assert await cached(s) == {"device": 0, "host": 0, "storage": 8}
        detached = await run("detach", address, "--json")
        assert detached.exit_code == 0
        assert json.loads(detached.output)["hicache_storage_backend"] is None


async def test_attached_read_only_a_store_gets_nothing(tmp_path: Path) -> None:
    async with listening() as (s, address):
        config = json.dumps({"path": str(tmp_path / "kv"), "prefetch_threshold": 0})
        assert (await run("attach", "file", address, "--config", config)).exit_code == 0
        await cached(s)
        await settled(s)
        assert (await run("detach", address)).exit_code == 0
        before = await run("ls", "file", "--json", "--config", config)
        config = json.dumps({**json.loads(config), "read_only": True})
        shown = await run("attach", "file", address, "--config", config, "--json")
        assert json.loads(shown.output)["hicache_storage_backend_extra_config"]["read_only"]
        other = {"input_ids": list(range(20, 40)), "sampling_params": {"max_new_tokens": 1}}
        assert (await s.client.post("/generate", json=other)).status_code == 200
        await settled(s)
        (backend,) = s.engine.cache.snapshot().backends
        assert (backend.read_only, backend.stored_nbytes, backend.breaker) == (True, 0, "closed")
        assert (await run("ls", "file", "--json", "--config", config)).output == before.output


async def test_what_the_server_says_of_a_mistake_is_the_message(tmp_path: Path) -> None:
    async with listening() as (_, address):
        failed = await run("attach", "file", address, "--config", '{"path": "/dev/null/no"}')
        assert failed.exit_code == 1
        assert "answers 400: Failed to attach HiCache storage backend" in failed.output
        unknown = await run("attach", "rediss", address)
        assert (unknown.exit_code, "rediss" in unknown.output) == (1, True)
        assert (await run("detach", address)).exit_code == 0


async def test_the_admin_key_is_asked_for_and_taken_from_the_environment() -> None:
    async with listening(keys=Keys(admin=ADMIN)) as (_, address):
        refused = await run("flush", address)
        assert refused.exit_code == 1
        assert (
            "answers 401: this call needs the admin key; give it with --api-key" in refused.output
        )
        wrong = await run("flush", address, "--api-key", "another")
        assert "another one was sent" in wrong.output
        assert (await run("flush", address, "--api-key", ADMIN)).exit_code == 0
        flushed = await run("flush", address, "--json", HICACHE_ADMIN_API_KEY=ADMIN)
        assert json.loads(flushed.output) == {"url": f"http://{address}", "flushed": True}


async def test_where_nothing_listens_or_something_else_does_it_is_said() -> None:
    nowhere = await run("flush", f"127.0.0.1:{free_port()}")
    assert nowhere.exit_code == 1
    assert "no answer from http://127.0.0.1:" in nowhere.output

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"not here"})

    async with on_a_port(bare) as address:
        other = await run("detach", address)
    assert "it has no such call; only hicache serve has it" in other.output
