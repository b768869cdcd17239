"""The event stream: answers in pieces, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hicache_core.server.answers import DONE, OpenAIForm, event, generated
from hicache_core.server.bodies import StreamOptions
from hicache_core.server.bridge import Bridge, FullAnswer, NamedRequest, Pending, growing
from hicache_core.server.logprobs import TokenTexts
from hicache_core.server.problems import Problem

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
]


class Pieces(Protocol):
    """The form of a stream."""

    def start(self, index: int) -> Iterator[object]:
        """Before the first step of an answer."""
        ...

    def step(self, index: int, whole: FullAnswer) -> Iterator[object]:
        """After each step."""
        ...

    def end(self, answers: Sequence[FullAnswer]) -> Iterator[object]:
        """When all answers have ended."""
        ...


class GeneratePieces:
    """SGLang's form: each piece has the text from the start."""

    def __init__(self, *, single: bool, texts: TokenTexts | None = None) -> None:
        """Of a batch, each piece says which answer it belongs to; ``texts`` as of ``generated``."""
        self._single = single
        self._texts = texts

    def start(self, index: int) -> Iterator[object]:  # noqa: ARG002 - a form of its own
        # docstring inherited
        yield from ()

    def step(self, index: int, whole: FullAnswer) -> Iterator[object]:
        # docstring inherited
        piece = generated(whole, self._texts)
        yield piece if self._single else {**piece, "index": index}

    def end(self, answers: Sequence[FullAnswer]) -> Iterator[object]:  # noqa: ARG002 - likewise
        # docstring inherited
        yield from ()


class OpenAIPieces:
    """OpenAI's form: each piece has what is new."""

    def __init__(self, form: OpenAIForm, options: StreamOptions | None) -> None:
        """``options``: whether the last piece has usage, and whether each piece has its own."""
        self._form = form
        self._usage = options is not None and bool(options.include_usage)
        self._all_along = (
            self._usage and options is not None and bool(options.continuous_usage_stats)
        )
        self._told: dict[int, tuple[int, int]] = {}  # tokens with log probabilities, and characters
        self._begun: set[int] = set()

    def start(self, index: int) -> Iterator[object]:
        # docstring inherited
        if (piece := self._form.start(index)) is not None:
            yield piece

    def step(self, index: int, whole: FullAnswer) -> Iterator[object]:
        # docstring inherited
        last = whole.last
        text = last.text if index in self._begun else whole.asked.echo + last.text
        self._begun.add(index)
        if text or last.finish_reason is not None:
            logprobs = self._logprobs(index, whole)
            piece = self._form.piece(index, text, last.finish_reason, logprobs)
            yield {**piece, "usage": self._form.usage([whole])} if self._all_along else piece

    def _logprobs(self, index: int, whole: FullAnswer) -> object:
        """Those of the tokens since the last piece."""
        texts = self._form.texts
        if texts is None:
            return None
        n_told, offset = self._told.get(index, (0, 0))
        found = (whole.prompt_logprobs + whole.logprobs)[n_told:]
        n_chars = sum(len(texts.of(one.token)) for one in found)
        self._told[index] = n_told + len(found), offset + n_chars
        return self._form.logprobs(found, offset)

    def end(self, answers: Sequence[FullAnswer]) -> Iterator[object]:
        # docstring inherited
        if (piece := self._form.end(answers, usage=self._usage)) is not None:
            yield piece


class EventStream(Response):
    """Submits requests and streams their answers, until they end or the client leaves."""

    def __init__(
        self, bridge: Bridge, asked: Sequence[NamedRequest], http: Request, pieces: Pieces
    ) -> None:
        """Submits nothing before the response is awaited, so requests may still be refused then.

        Args:
            bridge: to the engine.
            asked: the requests, submitted together or not at all.
            http: the client's request, which tells when the client has left.
            pieces: makes the pieces of the stream.
        """
        self.status_code = 200
        self.background = None
        self._bridge = bridge
        self._asked = asked
        self._http = http
        self._pieces = pieces

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 - the request has both
        receive: Receive,  # noqa: ARG002
        send: Send,
    ) -> None:
        # docstring inherited
        async with self._bridge.running(self._asked, self._http) as pending:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            async for piece in self._events(pending):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _events(self, pending: Sequence[Pending]) -> AsyncIterator[bytes]:
        wholes: dict[int, FullAnswer] = {}
        try:
            async for index, whole in _merged(pending):
                if index not in wholes:
                    for piece in self._pieces.start(index):
                        yield event(piece)
                wholes[index] = whole
                for piece in self._pieces.step(index, whole):
                    yield event(piece)
        except Problem as problem:
            yield event(problem.as_dict())
        else:
            if len(wholes) == len(pending):
                for piece in self._pieces.end([wholes[n] for n in range(len(pending))]):
                    yield event(piece)
        yield DONE


async def _merged(pending: Sequence[Pending]) -> AsyncIterator[tuple[int, FullAnswer]]:
    """The steps of several answers, as they come.

    Raises:
        Problem: the engine failed at one of them.
    """
    if len(pending) == 1:
        async for whole in growing(pending[0]):
            yield 0, whole
        return
    steps: asyncio.Queue[tuple[int, FullAnswer] | Problem | None] = asyncio.Queue()

    async def follow(index: int) -> None:
        try:
            async for whole in growing(pending[index]):
                steps.put_nowait((index, whole))
            steps.put_nowait(None)
        except Problem as problem:
            steps.put_nowait(problem)

    tasks = [asyncio.create_task(follow(n)) for n in range(len(pending))]
    try:
        n_open = len(tasks)
        while n_open:
            step = await steps.get()
            if isinstance(step, Problem):
                raise step
            if step is None:
                n_open -= 1
            else:
                yield step
    finally:
        for task in tasks:
            task.cancel()
