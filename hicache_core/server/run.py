"""The run of a server: loads the model, opens the engine, listens, and ends in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import uvicorn

from hicache_core.build.settings_check import check_settings
from hicache_core.build.start_check import check_start
from hicache_core.config.hosts import joined
from hicache_core.disaggregation.roles import Role
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.errors import ConfigError, RankLost
from hicache_core.integrations.model_check import vocabulary_of
from hicache_core.server.app import make_app
from hicache_core.server.connections import bounded
from hicache_core.server.models import (
    check_model_path,
    load_model,
    served_name,
    tokenizer_path,
)
from hicache_core.server.prompts import Limits
from hicache_core.server.rank_processes import RankProcesses
from hicache_core.server.role import make_engine, role_of
from hicache_core.server.service import ServedModel, Service
from hicache_core.server.settings import ServerSettings, notices, with_secret
from hicache_core.server.summary import summary

log = logging.getLogger(__name__)


def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains backups for a limited time and returns.

    Args:
        settings: of server, engine and cache.
        say: prints a line for the operator.

    Raises:
        HiCacheError: the server cannot start; everything that was started has ended.
    """
    asked, settings = settings, with_secret(settings)
    role = role_of(settings)
    in_force = settings.cache.resolve().in_force
    check_settings(in_force)  # before a model is loaded, which may take minutes
    check_start(in_force, settings.tp)
    with _listening(settings.host, settings.port) as listener:
        check_model_path(settings)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for line in notices(asked, device):
            say(f"hicache: {line}")
        with RankProcesses(settings, device) as processes:
            model = load_model(settings.model_path, device, settings.dtype, settings.chat_template)
            engine = make_engine(settings, model, role, processes.meet(model))
            engine.open()
            try:
                service = make_service(settings, model, engine, role)
                url = "http://" + joined(*listener.getsockname()[:2])
                lines = [*summary(service, url), f"serves {service.served.name} at {url}"]
                _run(service, listener, partial(say, "\n".join(f"hicache: {x}" for x in lines)))
            finally:
                engine.close(settings.shutdown_timeout_s)
            if settings.tp > 1 and (error := engine.status().error):
                raise RankLost(f"the server has ended, since its engine has stopped: {error}")


def make_service(
    settings: ServerSettings, model: LoadedModel, engine: Engine, role: Role | None = None
) -> Service:
    """The service over an open engine.

    Args:
        settings: of the server.
        model: what the engine computes; its name and tokenizer are used.
        engine: open.
        role: prefill or decode; None for both.
    """
    limits = Limits(engine.status().context_length, vocabulary_of(model.model))
    served = ServedModel(
        served_name(settings, model),
        model.tokenizer,
        limits,
        model.name,
        tokenizer_path(settings, model),
    )
    return Service(settings, served, engine, role)


class _Server(uvicorn.Server):
    """Uvicorn's server; calls back when it listens, and ends when the engine has ended."""

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], has_ended: Callable[[], bool]
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._has_ended = has_ended

    async def on_tick(self, counter: int) -> bool:
        # docstring inherited
        return await super().on_tick(counter) or self._has_ended()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # docstring inherited
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _run(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    settings = service.settings
    config = uvicorn.Config(
        make_app(service),
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
        server_header=False,
        **bounded(),
    )

    def has_lost_a_rank() -> bool:
        return settings.tp > 1 and bool(service.engine.status().error)

    with _signals_are_no_deaths():
        asyncio.run(_Server(config, on_ready, has_lost_a_rank).serve([listener]))


@contextmanager
def _signals_are_no_deaths() -> Iterator[None]:
    """Uvicorn raises the signal that ended it once more; by then all is done."""
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, so that a port in use is reported before a model is loaded.

    Raises:
        ConfigError: the address is taken, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"the server cannot listen on {host}:{port}: {error}; choose another --port, or 0 "
                "for any free one"
            ) from error
        yield listener
