"""docs/server.md is held to the code: each flag, each call, each series of the server."""

from __future__ import annotations

from pathlib import Path

import click
from prometheus_client import CollectorRegistry, generate_latest

from hicache_core.cli.serve import command
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.config import EngineStatus
from hicache_core.observe.catalogue import SERIES
from hicache_core.server import routes_admin, routes_generate, routes_info, routes_tokens
from hicache_core.server.prompts import Limits
from hicache_core.server.request_metrics import RequestMetrics, ServerCollector
from hicache_core.server.service import ServedModel, Service
from hicache_core.server.settings import ServerSettings

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
STATUS = EngineStatus(0, 0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, "")


def test_every_flag_of_the_server_has_its_line() -> None:
    own = [
        option.opts[0]
        for option in command.params
        if isinstance(option, click.Option) and option.name not in HiCacheConfig.model_fields
    ]
    assert len(own) > 20
    assert [flag for flag in own if flag != "--config" and f"`{flag}`" not in PAGE] == []


def test_every_call_is_named() -> None:
    class NoEngine:
        cache = None

    served = ServedModel("x", None, Limits(1, 1))
    service = Service(ServerSettings("x", HiCacheConfig()), served, NoEngine())  # type: ignore[arg-type]
    paths = {
        route.path.partition("{")[0].rstrip("/")
        for module in (routes_generate, routes_tokens, routes_info, routes_admin)
        for route in module.make_router(service).routes
    }
    service.prompts.close()
    also = {"/model_info", "/server_info"}  # newer names of calls that the page has
    assert len(paths) > 12
    assert sorted(path for path in paths - also if path not in PAGE) == []


def test_every_series_of_the_server_is_named_and_no_series_of_the_cache() -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(RequestMetrics(), lambda: STATUS, ""))
    lines = generate_latest(registry).decode().splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert len(names) == 15
    assert [name for name in names if f"`{name}`" not in PAGE] == []
    of_the_cache = {series.name for section in SERIES.values() for series in section}
    assert names.isdisjoint(of_the_cache)
