"""The bridge: from the engine's thread to the event loop, and back when a client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest

from hicache_core.engine.request import Output, Request, TokenLogprobs
from hicache_core.observe.tracing import Origin, traceparent
from hicache_core.server.problems import Problem
from hicache_core.server.request_log import log_request
from hicache_core.server.request_metrics import RequestMetrics
from hicache_core.server.request_names import RequestNames
from hicache_core.types import Namespace

if TYPE_CHECKING:
    from hicache_core.build.cache import HiCache
    from hicache_core.engine.config import EngineStatus

T = TypeVar("T")


class EngineFront(Protocol):
    """The methods of ``Engine`` that the server uses; any thread may call them."""

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queues a request."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request."""
        ...

    def call(self, work: Callable[[HiCache], T], timeout_s: float) -> T:
        """Runs ``work``, which only looks, on the engine's thread."""
        ...

    def call_all(self, method: str, *arguments: object, timeout_s: float) -> Any:
        """Calls a method of the cache on the engine's thread, on every rank."""
        ...

    def namespace(self, namespace: Namespace) -> Namespace:
        """The namespace under which the engine keeps the pages of a request."""
        ...

    def status(self) -> EngineStatus:
        """What the engine does now."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Drains and ends."""
        ...

    @property
    def cache(self) -> HiCache:
        """The cache, for its ``snapshot`` and ``explain``."""
        ...


@dataclass(frozen=True, slots=True)
class NamedRequest:
    """One prompt on its way to the engine.

    Attributes:
        name: what its tenant calls it.
        request: what the engine gets.
        echo: text before the answer.
    """

    name: str
    request: Request
    echo: str = ""


class Pending:
    """One running request; used on the event loop that submitted it."""

    def __init__(self, asked: NamedRequest) -> None:
        """Nothing is submitted yet."""
        self.asked = asked
        self.has_ended = False
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[Output | None] = asyncio.Queue()

    def on_output(self, output: Output) -> None:
        """Takes an output; on the engine's thread."""
        self.call_soon(partial(self._outputs.put_nowait, output))

    def call_soon(self, work: Callable[[], None]) -> None:
        """Runs ``work`` on the event loop; returns at once. Any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any longer
            self._loop.call_soon_threadsafe(work)

    def give_up(self) -> None:
        """Wakes whoever waits for outputs: there will be no more."""
        self._outputs.put_nowait(None)

    async def outputs(self) -> AsyncIterator[Output]:
        """One a step, the last with a ``finish_reason``; ends early after ``give_up``."""
        while not self.has_ended:
            output = await self._outputs.get()
            if output is None:
                return
            self.has_ended = output.finish_reason is not None
            yield output


class Bridge:
    """Submits requests and ensures that each ends, with its last output or an abort."""

    def __init__(
        self,
        engine: EngineFront,
        names: RequestNames,
        metrics: RequestMetrics,
        *,
        is_traced: bool = False,
        is_logged: bool = False,
    ) -> None:
        """Starts nothing.

        Args:
            engine: computes the requests.
            names: of the requests, released when they end.
            metrics: counts their outputs.
            is_traced: True to make spans of the cache children of the span of the call.
            is_logged: True to log each request of a client when it ends.
        """
        self._is_traced = is_traced
        self._is_logged = is_logged
        self.engine = engine
        self.names = names
        self.metrics = metrics

    @asynccontextmanager
    async def running(
        self, asked: Sequence[NamedRequest], http: HttpRequest | None
    ) -> AsyncIterator[list[Pending]]:
        """Submits all of ``asked`` or none; aborts at the end, or when the client leaves.

        Raises:
            QueueFull, InvalidTokens, ConfigError, UseAfterClose: as ``Engine.submit``.
        """
        pending: list[Pending] = []
        gone: asyncio.Task[None] | None = None
        try:
            for one in asked:
                waiting = Pending(one)
                on_output = self._counted(waiting, is_logged=self._is_logged and http is not None)
                self.engine.submit(self._of(one, http), on_output)
                pending.append(waiting)
            if http is not None:
                gone = asyncio.create_task(self._follow(http, pending))
            yield pending
        finally:
            if gone is not None:
                gone.cancel()
            for one in asked:
                self.names.close(one.name, one.request.namespace)
            self._abort(pending)

    def _of(self, asked: NamedRequest, http: HttpRequest | None) -> Request:
        """The request, with what its client calls it and the span that it belongs to."""
        if not self._is_traced:
            return asked.request
        header = "" if http is None else http.headers.get("traceparent", "")
        return replace(asked.request, origin=Origin(asked.name, traceparent(header)))

    def _counted(self, waiting: Pending, *, is_logged: bool) -> Callable[[Output], None]:
        def on_output(output: Output) -> None:
            self.metrics.take(output)
            waiting.on_output(output)
            if is_logged and output.finish_reason is not None:  # not on the engine's thread
                waiting.call_soon(partial(log_request, waiting.asked.name, output))

        return on_output

    async def _follow(self, http: HttpRequest, pending: Sequence[Pending]) -> None:
        """Waits until the client has left, and aborts its requests."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._abort(pending)

    def _abort(self, pending: Sequence[Pending]) -> None:
        for waiting in pending:
            if not waiting.has_ended:
                self.engine.abort(waiting.asked.request.request_id)
                waiting.give_up()


@dataclass(frozen=True, slots=True)
class FullAnswer:
    """An answer from its first token to its last.

    Attributes:
        asked: the prompt.
        text: all of it.
        tokens: likewise.
        last: the last output.
        logprobs: of its tokens, if they are wanted.
        prompt_logprobs: of the prompt, likewise.
    """

    asked: NamedRequest
    text: str
    tokens: tuple[int, ...]
    last: Output
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def plus(self, output: Output) -> FullAnswer:
        """With what one more step brought."""
        return FullAnswer(
            self.asked,
            self.text + output.text,
            self.tokens + output.new_tokens,
            output,
            self.logprobs + output.logprobs,
            self.prompt_logprobs,
        )


async def growing(pending: Pending) -> AsyncIterator[FullAnswer]:
    """Yields the answer so far, after each step.

    Raises:
        Problem: the engine failed, or stopped.
    """
    whole: FullAnswer | None = None
    async for output in pending.outputs():
        if output.finish_reason == "error":
            raise Problem(500, output.error or "the engine failed while it computed this request")
        if output.finish_reason == "abort":
            raise Problem(503, "the request was aborted: the server is shutting down")
        if whole is None:
            whole = FullAnswer(
                pending.asked,
                pending.asked.echo + output.text,
                output.new_tokens,
                output,
                output.logprobs,
                output.prompt_logprobs,
            )
        else:
            whole = whole.plus(output)
        yield whole


async def finished(pending: Pending) -> FullAnswer:
    """Waits for the whole answer.

    Raises:
        Problem: as ``growing``; 499 if the client has left.
    """
    last: FullAnswer | None = None
    async for whole in growing(pending):
        last = whole
    if last is None or not pending.has_ended:
        raise Problem(499, "the client has left")
    return last
