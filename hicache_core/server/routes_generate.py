"""The routes that generate: ``/generate``, ``/v1/completions``, ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hicache_core.server.access import check_priority
from hicache_core.server.answers import OpenAIForm, generated
from hicache_core.server.bodies import (
    ChatBody,
    CompletionBody,
    GenerateBody,
)
from hicache_core.server.body_route import BodyRoute
from hicache_core.server.bridge import FullAnswer, NamedRequest, finished
from hicache_core.server.problems import json_answer
from hicache_core.server.service import Service
from hicache_core.server.stream import EventStream, GeneratePieces, OpenAIPieces


def make_router(service: Service) -> APIRouter:
    """The routes, over ``service``."""
    router = APIRouter(route_class=BodyRoute)
    most = service.settings.max_client_priority

    @router.put("/generate", include_in_schema=False)
    @router.post("/generate")
    async def generate(http: Request, body: GenerateBody) -> Response:
        """SGLang's: answers one prompt or several, in one piece or as server-sent events."""
        check_priority(body.priority or 0, most, http.scope)
        asked = await service.prompts.of_generate(body)
        single = not body.is_batch and len(asked) == 1
        texts = service.texts if body.return_text_in_logprobs else None
        if body.stream:
            pieces = GeneratePieces(single=single, texts=texts)
            return EventStream(service.bridge, asked, http, pieces)
        answers = [generated(whole, texts) for whole in await _all(service, asked, http)]
        return json_answer(answers[0] if single else answers)

    @router.post("/v1/completions")
    async def completions(http: Request, body: CompletionBody) -> Response:
        """OpenAI's: completes one prompt or several."""
        check_priority(body.priority or 0, most, http.scope)
        return await _openai(service, body, await service.prompts.of_completion(body), http)

    @router.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatBody) -> Response:
        """OpenAI's: answers the last message of a chat."""
        check_priority(body.priority or 0, most, http.scope)
        return await _openai(service, body, await service.prompts.of_chat(body), http)

    return router


async def _openai(
    service: Service, body: CompletionBody | ChatBody, asked: Sequence[NamedRequest], http: Request
) -> Response:
    is_chat = isinstance(body, ChatBody)
    # One answer goes by its request's name, so that it can be asked for at /hicache/explain.
    name = asked[0].name if len(asked) == 1 else uuid.uuid4().hex
    form = OpenAIForm(
        answer_id=name,
        kind="chat" if is_chat else "text",
        model=service.served.name,
        created=int(time.time()),
        n_choices=body.n or 1,
        reports_cache=service.settings.enable_cache_report,
        details=bool(body.return_cached_tokens_details),
        texts=None if body.wanted_logprobs is None else service.texts,
    )
    if body.stream:
        return EventStream(service.bridge, asked, http, OpenAIPieces(form, body.stream_options))
    return json_answer(form.whole(await _all(service, asked, http)))


async def _all(service: Service, asked: Sequence[NamedRequest], http: Request) -> list[FullAnswer]:
    """All answers, whole. If one fails, the others are given up."""
    async with service.bridge.running(asked, http) as pending:
        return list(await asyncio.gather(*(finished(waiting) for waiting in pending)))
