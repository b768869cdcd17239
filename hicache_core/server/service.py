"""The service: one served model and everything that its routes use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hicache_core.config.redact import masked
from hicache_core.disaggregation.roles import Role
from hicache_core.observe.history import History
from hicache_core.observe.metrics import CacheCollector
from hicache_core.observe.snapshot import CacheSnapshot
from hicache_core.observe.windows import Watch
from hicache_core.server.bridge import Bridge, EngineFront
from hicache_core.server.logprobs import TokenTexts
from hicache_core.server.prompts import Limits, Prompts
from hicache_core.server.request_metrics import RequestMetrics, ServerCollector
from hicache_core.server.request_names import RequestNames
from hicache_core.server.rooms import Rooms
from hicache_core.server.settings import ServerSettings

OTHER_NAMESPACE = "other_namespace"
NEVER_SEEN = "never_seen"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served.

    Attributes:
        name: what clients see.
        tokenizer: transformers'.
        limits: of requests.
        own_name: another name by which clients may ask for it; empty for none.
        tokenizer_path: folder or name on a hub from which clients can load the tokenizer.
    """

    name: str
    tokenizer: Any
    limits: Limits
    own_name: str = ""
    tokenizer_path: str = ""


class Service:
    """Joins engine, prompts and metrics. Event loop only.

    Attributes:
        settings: of the server.
        served: the model.
        engine: computes the answers.
        bridge: submits requests to the engine.
        prompts: makes its requests from bodies.
        texts: of single tokens.
        watch: looks at the cache, with everything that the operator may see.
        history: samples of it; runs between ``open`` and ``close``.
        started_s: seconds since the epoch.
        role: prefill or decode; None for a server that does both.
    """

    def __init__(
        self,
        settings: ServerSettings,
        served: ServedModel,
        engine: EngineFront,
        role: Role | None = None,
    ) -> None:
        """Joins its parts.

        Args:
            settings: of the server.
            served: the model.
            engine: is open; ``close`` closes it.
            role: of a prefill or decode server; None for one that does both.
        """
        self.role = role
        self.settings = settings
        self.served = served
        self.engine = engine
        self.started_s = time.time()
        self.names = RequestNames()
        self.bridge = Bridge(
            engine,
            self.names,
            RequestMetrics(),
            is_traced=settings.cache.hicache_tracing,
            is_logged=settings.log_requests,
        )
        is_half = settings.disaggregation.mode != "null"
        rooms = Rooms(settings.keys.transfer) if is_half else None
        self.prompts = Prompts(served.tokenizer, served.limits, self.names, rooms)
        self.texts = TokenTexts(served.tokenizer)
        self.watch = Watch(self._snapshot)
        self.history = History(self.watch)
        self._watches = {True: self.watch, False: Watch(self._discreet_snapshot)}

    def open(self) -> None:
        """Starts to look at the cache once a second."""
        self.history.open()

    def close(self) -> None:
        """Drains the engine; blocks for at most twice the time that is set."""
        self.history.close()
        self.prompts.close()
        self.engine.close(self.settings.shutdown_timeout_s)

    def observation(self, *, is_admin: bool) -> dict[str, object]:
        """The cache and the engine, for ``/hicache/status``."""
        seen = asdict(self._watches[is_admin].observe())
        engine = {"model": self.served.name, **asdict(self.engine.status())}
        shown = masked({**seen, "engine": engine})
        assert isinstance(shown, dict)
        return shown

    def collectors(self, *, is_admin: bool) -> tuple[CacheCollector, ServerCollector]:
        """For ``/metrics``."""
        prefix = self.settings.cache.metrics_prefix
        labels = {"model_name": self.served.name}  # dashboards of SGLang choose by it
        return (
            CacheCollector(self._watches[is_admin], prefix=prefix, labels=labels),
            ServerCollector(self.bridge.metrics, self.engine.status, prefix, labels),
        )

    def explanation(
        self, request_id: str, name: str, *, is_admin: bool
    ) -> Mapping[str, object] | None:
        """Where a request's tokens came from; None if that is no longer known.

        Args:
            request_id: the engine's id.
            name: the tenant's name for it.
            is_admin: True to show that another tenant has the prefix.
        """
        found = self.engine.cache.explain(request_id)
        if found is None:
            return None
        shown = {**found.as_dict(), "request_id": name}
        if not is_admin and shown["reason"] == OTHER_NAMESPACE:
            shown |= {"reason": NEVER_SEEN, "detail": ""}
        shown["detail"] = masked(shown["detail"])
        return shown

    def recent(self, limit: int) -> list[Mapping[str, object]]:
        """Records of the newest requests, with their times once they have ended."""
        times = self.bridge.metrics.times
        return [
            {**found.as_dict(), **times.get(found.request_id, {})}
            for found in self.engine.cache.recent(limit)
        ]

    def _snapshot(self) -> CacheSnapshot:
        snapshot = self.engine.cache.snapshot()
        return snapshot if self.role is None else replace(snapshot, transfers=self.role.transfers())

    def _discreet_snapshot(self) -> CacheSnapshot:
        """Without what would tell a tenant that another one has the same prefix."""
        snapshot = self._snapshot()
        missed = dict(snapshot.missed_tokens)
        n_other = missed.pop(OTHER_NAMESPACE, 0)
        if n_other:
            missed[NEVER_SEEN] = missed.get(NEVER_SEEN, 0) + n_other
        return replace(snapshot, missed_tokens=missed)
