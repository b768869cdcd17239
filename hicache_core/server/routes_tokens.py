"""The routes of tokens: ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hicache_core.server.bodies import DetokenizeBody, TokenizeBody
from hicache_core.server.body_route import BodyRoute
from hicache_core.server.problems import json_answer
from hicache_core.server.service import Service


def make_router(service: Service) -> APIRouter:
    """The routes, over ``service``."""
    router = APIRouter(route_class=BodyRoute)
    prompts = service.prompts

    @router.post("/tokenize")
    async def tokenize(_http: Request, body: TokenizeBody) -> Response:
        """vLLM's: the tokens of a text, or of a chat as the model's template renders it."""
        tokens = await prompts.tokens_of(body)
        return json_answer(
            {
                "count": len(tokens),
                "max_model_len": service.served.limits.context_length,
                "tokens": tokens,
                "token_strs": await prompts.names_of(tokens) if body.return_token_strs else None,
            }
        )

    @router.post("/detokenize")
    async def detokenize(_http: Request, body: DetokenizeBody) -> Response:
        """vLLM's: the text of tokens, special tokens included."""
        return json_answer({"prompt": await prompts.text_of(body.tokens)})

    return router
