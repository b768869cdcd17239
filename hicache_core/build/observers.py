"""The part of ``build`` that makes what looks at a cache: explainer, events, status server."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hicache_core.config.settings import HiCacheConfig
from hicache_core.controller.controller import Controller
from hicache_core.controller.explain import Explainer, Explanation
from hicache_core.controller.parts import Parts
from hicache_core.observe.event_settings import events_config
from hicache_core.observe.history import History
from hicache_core.observe.http import StatusPages, StatusServer
from hicache_core.observe.journal import Journal, Journals
from hicache_core.observe.on_demand import OnDemand
from hicache_core.observe.snapshot import CacheSnapshot
from hicache_core.observe.tracing import spans
from hicache_core.observe.windows import Watch
from hicache_core.radix.picture import TreePicture, take_picture
from hicache_core.radix.tree import RadixTree

if TYPE_CHECKING:
    from hicache_core.observe.events import KvEvents

# How long a reader waits for the owner to step; it may compute for minutes, or rest.
_PATIENCE_S = 0.3
_TRIES = 10


class Observers:
    """What observes a cache, by its configuration. Made, opened and closed with the cache.

    Only rank 0 publishes events, since all ranks hold the same prefixes. Each rank has a status
    server of its own; its number is added to the port.
    """

    def __init__(self, config: HiCacheConfig, clock: Callable[[], float], rank: int) -> None:
        """Binds no address yet.

        Args:
            config: the settings in force.
            clock: seconds, increasing, for explanations.
            rank: number of this rank; only rank 0 publishes KV events.

        Raises:
            ConfigError: a setting is wrong, or its package is not installed.
        """
        self._config = config
        self._rank = rank
        self._explainer = Explainer(clock) if config.hicache_explain else None
        self._events = _events(config.kv_events_config) if rank == 0 else None
        self._picture: OnDemand[TreePicture] = OnDemand()
        self._history: History | None = None
        self._server: StatusServer | None = None
        self._cache: Controller | None = None

    def watching(self, parts: Parts) -> Parts:
        """The parts, with the observers attached."""
        told = (self._explainer, self._events)
        journals: list[Journal] = [journal for journal in told if journal is not None]
        return replace(
            parts,
            explainer=self._explainer,
            journal=Journals(journals) if journals else None,
            spans=spans(enabled=self._config.hicache_tracing),
        )

    def open(self) -> None:
        """Starts publishing, and takes the address of the status server, which answers later.

        Raises:
            ConfigError: an address is taken.
        """
        if self._events is not None:
            self._events.open()
        port = self._config.hicache_status_port
        if port is None:
            return
        watch = Watch(lambda: self._whole_cache().snapshot())
        history = History(watch)
        pages = StatusPages(
            watch,
            history,
            self._explain,
            lambda limit: [explanation.as_dict() for explanation in self.recent(limit)],
            lambda: self._picture.ask(_PATIENCE_S),
            metrics=_metrics(watch, self._config.metrics_prefix),
        )
        server = StatusServer(
            pages, host=self._config.hicache_status_host, port=port and port + self._rank
        )
        server.bind()
        self._server, self._history = server, history

    def begin(self, cache: Controller) -> None:
        """Starts the status server and the sampling of the cache.

        Args:
            cache: the cache, complete: other threads look at it from now on.
        """
        self._cache = cache
        if self._server is not None:
            self._server.open()
        if self._history is not None:
            self._history.open()

    def polled(self, tree: RadixTree) -> None:
        """Makes the picture that readers wait for. Owner thread, once a step."""
        self._picture.serve(lambda: take_picture(tree))

    def recent(self, limit: int) -> Sequence[Explanation]:
        """Explanations of the latest requests, newest first; any thread."""
        explainer = self._explainer
        if explainer is None:
            return []
        for _ in range(_TRIES):
            with contextlib.suppress(RuntimeError):  # the owner added one while they were copied
                found = map(explainer.explain, explainer.request_ids[::-1][:limit])
                return [explanation for explanation in found if explanation is not None]
        return []

    def _whole_cache(self) -> Controller:
        assert self._cache is not None, "nobody is answered before the cache is whole"
        return self._cache

    def _explain(self, request_id: str) -> Mapping[str, object] | None:
        explanation = self._whole_cache().explain(request_id)
        return None if explanation is None else explanation.as_dict()

    def complete(self, snapshot: CacheSnapshot) -> CacheSnapshot:
        """Adds what only the observers know to a snapshot of the cache."""
        return replace(snapshot, events=None if self._events is None else self._events.status())

    @property
    def status_url(self) -> str | None:
        """URL of the status server; None if there is none."""
        return None if self._server is None else self._server.url

    def close(self) -> None:
        """Stops all observers; may be called twice."""
        if self._history is not None:
            self._history.close()
            self._history = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._events is not None:
            self._events.close()


def _events(settings: Mapping[str, Any]) -> KvEvents | None:
    config = events_config(settings)
    if config is None:
        return None
    module = importlib.import_module("hicache_core.observe.events")
    events: KvEvents = module.KvEvents(config)
    return events


def _metrics(watch: Watch, prefix: str) -> Callable[[], bytes] | None:
    if importlib.util.find_spec("prometheus_client") is None:
        return None
    module = importlib.import_module("hicache_core.observe.metrics")
    collector = module.CacheCollector(watch, prefix=prefix)

    def exposition() -> bytes:
        text: bytes = module.exposition(collector)
        return text

    return exposition
