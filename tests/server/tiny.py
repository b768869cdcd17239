"""A tiny model behind the real engine and application, in this process, by a command line."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx

from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.server.app import make_app
from hicache_core.server.flags import server_flags, settings_of
from hicache_core.server.run import make_service
from hicache_core.server.settings import ServerSettings, notices

PAGE = (Path(__file__).parents[2] / "docs" / "best-practices.md").read_text(encoding="utf-8")
COMMAND = "python3 -m hicache_core.launch_server "
ROOM = ["--max-total-tokens", "1024"]


def commands() -> dict[str, list[str]]:
    """Our commands of the table in docs/best-practices.md, by what stands beside them."""
    rows = re.findall(rf"^\| (.+?) \| `{COMMAND}(.+?)` \|", PAGE, re.MULTILINE)
    return {there.replace("`", ""): shlex.split(here) for there, here in rows}


@click.command()
@server_flags
def _parse(**options: Any) -> ServerSettings:
    return settings_of(options)


def parsed(flags: Sequence[str]) -> ServerSettings:
    """The settings that a command line means."""
    settings = _parse.main(list(flags), standalone_mode=False)
    assert isinstance(settings, ServerSettings)
    return settings


@dataclass
class TinyServer:
    """A server that answers.

    Attributes:
        client: calls it from this machine.
        engine: the real one.
        said: what it says at start, the adjustments of its log included.
    """

    client: httpx.AsyncClient
    engine: Engine
    said: str

    async def ask(self, ids: list[int], max_new_tokens: int = 2) -> dict[str, Any]:
        """``meta_info`` of a greedy answer."""
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": params}
        answer = (await self.client.post("/generate", json=body)).raise_for_status().json()
        meta: dict[str, Any] = answer["meta_info"]
        return {**meta, "output_ids": answer["output_ids"]}

    async def settle(self) -> None:
        """Returns when all that was accepted is on the host and in storage."""
        assert await asyncio.to_thread(self.engine.call, lambda cache: cache.flush(20.0), 30.0)

    async def metrics(self) -> dict[str, float]:
        """Every sample by its name and its labels, without that of the model."""
        text = (await self.client.get("/metrics")).raise_for_status().text
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {unlabelled(name): float(value) for name, value in samples}

    async def info(self) -> dict[str, Any]:
        """What is in force."""
        info: dict[str, Any] = (await self.client.get("/get_server_info")).json()
        return info


@contextlib.asynccontextmanager
async def tiny_server(model: LoadedModel, flags: Sequence[str]) -> AsyncIterator[TinyServer]:
    """Starts what ``hicache serve`` starts, without a socket; closed at the end."""
    settings = parsed([*flags, "--enable-metrics"])
    engine = Engine(model, settings.cache, settings.engine)
    engine.open()
    try:
        app = make_app(make_service(settings, model, engine))
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            said = [*map(str, settings.cache.resolve().adjustments), *notices(settings, "cpu")]
            yield TinyServer(client, engine, "\n".join(said))
    finally:
        engine.close(1.0)


def unlabelled(name: str) -> str:
    """A sample's name without prefix and without the label of the model."""
    plain = re.sub(r',?model_name="[^"]*"', "", name.removeprefix("hicache:"))
    return plain.replace("{,", "{").replace("{}", "")
