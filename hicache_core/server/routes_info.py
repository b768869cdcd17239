"""The routes that tell: health, models, status, metrics, explanations."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from hicache_core.config.redact import masked
from hicache_core.engine.request import Request as EngineRequest
from hicache_core.engine.request import SamplingParams
from hicache_core.observe.event_settings import advertised, events_config
from hicache_core.observe.http import PROMETHEUS_TEXT
from hicache_core.server.access import ADMIN
from hicache_core.server.bridge import NamedRequest, finished
from hicache_core.server.docs_page import docs_page
from hicache_core.server.problems import Problem, json_answer
from hicache_core.server.prompts import namespace_of
from hicache_core.server.service import Service
from hicache_core.types import Namespace

DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
HEALTH_TIMEOUT_S = 20.0
# What a health check leaves in the cache is of no use to anybody.
_HEALTH = Namespace(extra_key="hicache health check")
SALT_HEADER = "x-hicache-salt"
EXTRA_KEY_HEADER = "x-hicache-extra-key"


def make_router(service: Service) -> APIRouter:
    """The routes, over ``service``."""
    router = APIRouter()
    _add_docs(router)
    _add_health(router, service)
    _add_models(router, service)
    _add_infos(router, service)
    _add_status(router, service)
    return router


def _add_docs(router: APIRouter) -> None:
    @router.get("/docs", include_in_schema=False)
    async def docs(http: Request) -> Response:
        page = docs_page(http.app.openapi())
        return HTMLResponse(page, headers={"Content-Security-Policy": DOCS_POLICY})


def _add_health(router: APIRouter, service: Service) -> None:
    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """Whether the engine runs, and no request is stuck."""
        status = service.engine.status()
        if status.error:
            raise Problem(503, f"the engine has stopped: {status.error}")
        if status.stalled:
            raise Problem(503, status.stalled)
        if service.role is not None and (fault := service.role.fault):
            raise Problem(503, f"KV transfers: {fault}")
        return json_answer({"status": "ok"})

    @router.get("/health_generate")
    async def health_generate() -> Response:
        """Whether the engine computes a token."""
        _, request_id = service.names.open(None, _HEALTH)
        request = EngineRequest(
            request_id, (0,), SamplingParams(max_new_tokens=1, temperature=0.0), _HEALTH
        )
        async with (
            asyncio.timeout(HEALTH_TIMEOUT_S),
            service.bridge.running([NamedRequest(request_id, request)], None) as pending,
        ):
            await finished(pending[0])
        return json_answer({"status": "ok"})


def _add_models(router: APIRouter, service: Service) -> None:
    served = service.served
    card = {
        "id": served.name,
        "object": "model",
        "created": int(service.started_s),
        "owned_by": "hicache",
        "root": served.tokenizer_path or served.name,
        "max_model_len": served.limits.context_length,
    }

    @router.get("/v1/models")
    async def models() -> Response:
        """The one model that is served, in OpenAI's list."""
        return json_answer({"object": "list", "data": [card]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model of that name."""
        if name not in (served.name, served.own_name):
            raise Problem(404, f"no model {name!r} here; there is {served.name!r}")
        return json_answer(card)


def _add_infos(router: APIRouter, service: Service) -> None:
    served, settings = service.served, service.settings

    @router.get("/get_model_info")
    @router.get("/model_info")
    async def model_info() -> Response:
        """What is served."""
        return json_answer(
            {
                "model_path": settings.model_path,
                "tokenizer_path": served.tokenizer_path or settings.model_path,
                "served_model_name": served.name,
                "is_generation": True,
                "disaggregation_mode": settings.disaggregation.mode,
                "max_model_len": served.limits.context_length,
                "vocab_size": served.limits.vocab_size,
            }
        )

    @router.get("/get_server_info")
    @router.get("/server_info")
    async def server_info() -> Response:
        """The settings in force, where each came from, and the state of the engine."""
        status = service.engine.status()
        shown = asdict(replace(settings, cache=None, keys=None))  # type: ignore[arg-type]
        del shown["cache"], shown["keys"]
        in_force = settings.cache.resolve().in_force
        events = events_config(in_force.kv_events_config)
        state = {**asdict(status), "last_gen_throughput": status.tokens_per_s}
        return json_answer(
            {
                **shown,
                **in_force.model_dump(),
                "setting_sources": dict(in_force.sources),
                "tokenizer_path": served.tokenizer_path or settings.model_path,
                "served_model_name": served.name,
                "kv_events": advertised(events, in_force.page_size),
                "max_total_num_tokens": status.n_slots,
                "internal_states": [state],
                **({} if service.role is None else service.role.status()),
            }
            | {"hicache_storage_backend_extra_config": masked(_extra(service))}
        )


def _extra(service: Service) -> dict[str, object]:
    return service.settings.cache.hicache_storage_backend_extra_config


def _add_status(router: APIRouter, service: Service) -> None:
    @router.get("/hicache/status")
    async def status(http: Request) -> Response:
        """The cache and the queue."""
        return json_answer(service.observation(is_admin=_is_admin(http)))

    @router.get("/metrics")
    async def metrics(http: Request) -> Response:
        """The same for Prometheus."""
        if not service.settings.enable_metrics:
            raise Problem(404, "no metrics here: start the server with --enable-metrics")
        registry = CollectorRegistry(auto_describe=False)
        for collector in service.collectors(is_admin=_is_admin(http)):
            registry.register(collector)
        return Response(generate_latest(registry), headers={"Content-Type": PROMETHEUS_TEXT})

    @router.get("/hicache/explain/{name:path}")
    async def explain(name: str, http: Request) -> Response:
        """Where a request's tokens came from, and why not from the cache."""
        is_admin = _is_admin(http)
        namespace = namespace_of(
            http.headers.get(SALT_HEADER) or None, http.headers.get(EXTRA_KEY_HEADER) or None
        )
        found = service.names.find(name, namespace)
        if found is None and is_admin:
            found = service.names.find_any(name)
        shown = found and service.explanation(found, name, is_admin=is_admin)
        if not shown:
            raise Problem(404, f"no record of request {name!r}; only the latest requests are kept")
        return json_answer(shown)


def _is_admin(http: Request) -> bool:
    return bool(http.scope.get(ADMIN))
