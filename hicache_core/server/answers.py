"""Answers: what a client gets back, in SGLang's form and in OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from hicache_core.engine.request import CachedTokens, TokenLogprobs
from hicache_core.server.bridge import FullAnswer
from hicache_core.server.logprobs import (
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    generate_logprobs,
)

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, default=str).encode() + b"\n\n"


def by_tier(cached: CachedTokens) -> dict[str, int]:
    """Cached tokens of a prompt, by the tier that had them."""
    return {"device": cached.device, "host": cached.host, "storage": cached.storage}


def generated(whole: FullAnswer, texts: TokenTexts | None = None) -> dict[str, object]:
    """An answer of ``/generate``, finished or not: text and tokens from the start.

    ``texts`` puts the text of each token beside its log probability.
    """
    last = whole.last
    reason: dict[str, object] | None = None
    if last.finish_reason is not None:
        reason = {"type": last.finish_reason}
        if last.finish_reason == "length":
            reason["length"] = last.completion_tokens
    meta: dict[str, object] = {
        "id": whole.asked.name,
        "finish_reason": reason,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "cached_tokens": last.cached.total,
        "cached_tokens_details": by_tier(last.cached),
        **generate_logprobs(whole, texts),
    }
    times = last.times
    if times.finished:
        meta["e2e_latency"] = times.finished - times.arrived
    if times.finished and times.first_token:
        meta["time_to_first_token"] = times.first_token - times.arrived
    return {"text": whole.text, "output_ids": list(whole.tokens), "meta_info": meta}


@dataclass(frozen=True, slots=True)
class OpenAIForm:
    """One answer of an OpenAI call, whole or in pieces.

    Attributes:
        answer_id: equal in all pieces.
        kind: ``chat`` or ``text``.
        model: the served name.
        created: seconds since the epoch.
        n_choices: answers to each prompt.
        reports_cache: whether usage says what was cached (``--enable-cache-report``).
        details: whether the client asked for the split by tier, where SGLang has it.
        texts: of single tokens, for log probabilities; None if the client wants none.
    """

    answer_id: str
    kind: str
    model: str
    created: int
    n_choices: int
    reports_cache: bool
    details: bool
    texts: TokenTexts | None = None

    def whole(self, answers: Sequence[FullAnswer]) -> dict[str, object]:
        """The answer to a client that does not stream."""
        choices = []
        for index, answer in enumerate(answers):
            choice: dict[str, object] = {
                "index": index,
                "logprobs": self.logprobs(answer.prompt_logprobs + answer.logprobs),
                "finish_reason": answer.last.finish_reason,
            }
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": answer.text}
            else:
                choice["text"] = answer.text
            choices.append(choice)
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return {
            **self._head(kind),
            "choices": choices,
            "usage": self.usage(answers),
            **self._extension(answers),
        }

    def start(self, index: int) -> dict[str, object] | None:
        """The first piece of a choice: its role; a text has none."""
        if self.kind != "chat":
            return None
        return self._piece(index, {"role": "assistant", "content": ""}, None, None)

    def piece(
        self, index: int, text: str, finish_reason: str | None, logprobs: object = None
    ) -> dict[str, object]:
        """One piece of the stream: the text of one step.

        Args:
            index: number of the choice, from 0.
            text: new text; may be empty.
            finish_reason: why the choice ended; None if it goes on.
            logprobs: of its tokens, as ``logprobs`` makes them.
        """
        delta = {"content": text} if text else {}
        return self._piece(index, delta if self.kind == "chat" else text, finish_reason, logprobs)

    def logprobs(self, found: Sequence[TokenLogprobs], offset: int = 0) -> object:
        """Log probabilities in the form of the call; None if the client wants none.

        Args:
            found: of the tokens, in order.
            offset: characters of the tokens before them.
        """
        if self.texts is None:
            return None
        if self.kind == "chat":
            return chat_logprobs(found, self.texts)
        return completion_logprobs(found, self.texts, offset)

    def end(self, answers: Sequence[FullAnswer], *, usage: bool) -> dict[str, object] | None:
        """The last piece, without a choice: usage, and the split by tier if asked for."""
        extension = self._extension(answers)
        if not usage and not extension:
            return None
        piece: dict[str, object] = {**self._head(self._piece_kind), "choices": [], **extension}
        if usage:
            piece["usage"] = self.usage(answers)
        return piece

    def usage(self, answers: Sequence[FullAnswer]) -> dict[str, object]:
        """Tokens in and out; the prompt of several choices counts once."""
        prompts = answers[:: self.n_choices]
        n_prompt = sum(answer.last.prompt_tokens for answer in prompts)
        n_new = sum(answer.last.completion_tokens for answer in answers)
        usage: dict[str, object] = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
        }
        if self.reports_cache:
            cached = _sum(prompts)
            usage["prompt_tokens_details"] = {
                "cached_tokens": cached.total,
                "cached_tokens_details": by_tier(cached),
            }
        return usage

    def _extension(self, answers: Sequence[FullAnswer]) -> dict[str, object]:
        if not self.details:
            return {}
        cached = by_tier(_sum(answers[:: self.n_choices]))
        return {"sglext": {"cached_tokens_details": cached}}

    @property
    def _piece_kind(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _piece(
        self, index: int, content: object, reason: str | None, logprobs: object
    ) -> dict[str, object]:
        choice = {
            "index": index,
            "delta" if self.kind == "chat" else "text": content,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        return {**self._head(self._piece_kind), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def _sum(answers: Sequence[FullAnswer]) -> CachedTokens:
    return CachedTokens(
        device=sum(answer.last.cached.device for answer in answers),
        host=sum(answer.last.cached.host for answer in answers),
        storage=sum(answer.last.cached.storage for answer in answers),
    )
