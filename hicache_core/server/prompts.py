"""Prompts: from the body of a request to what the engine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hicache_core.engine.request import Bootstrap, Request, SamplingParams, WantedLogprobs
from hicache_core.server.bodies import (
    ChatBody,
    CompletionBody,
    GenerateBody,
    Message,
    OpenAIBody,
    Rendering,
    SamplingBody,
    Shared,
    TokenizeBody,
)
from hicache_core.server.bridge import NamedRequest
from hicache_core.server.chat import rendered
from hicache_core.server.encoder import Encoder
from hicache_core.server.problems import Problem
from hicache_core.server.request_names import RequestNames
from hicache_core.server.rooms import Rooms
from hicache_core.types import Namespace


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for.

    Attributes:
        context_length: tokens of prompt and answer together.
        vocab_size: token ids are below it.
        max_body_nbytes: of a request's body.
    """

    context_length: int
    vocab_size: int
    max_body_nbytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One answer that is wanted."""

    tokens: tuple[int, ...]
    sampling: SamplingParams
    name: str | None
    logprobs: WantedLogprobs | None = None
    echo: str = ""


class Prompts:
    """Makes the engine's requests."""

    def __init__(
        self, tokenizer: Any, limits: Limits, names: RequestNames, rooms: Rooms | None = None
    ) -> None:
        """Starts the encoder; ``close`` ends it.

        Args:
            tokenizer: that of the model, from transformers.
            limits: what a request may ask for.
            names: gives each request its id.
            rooms: checks the rooms that requests name; None ignores them.
        """
        self.limits = limits
        self._rooms = rooms
        self._encoder = Encoder(tokenizer, limits.context_length)
        self._names = names

    def close(self) -> None:
        """Ends the encoder."""
        self._encoder.close()

    async def of_generate(self, body: GenerateBody) -> list[NamedRequest]:
        """One for each prompt and choice, in order."""
        prompts = body.prompts
        given = body.sampling_params or SamplingBody()
        sampling = [given] * len(prompts) if isinstance(given, SamplingBody) else given
        _check_length(sampling, len(prompts), "sampling_params")
        names = _names(body.rid, len(prompts))
        encoded = await self._encode(prompts)
        asked = []
        for tokens, own, name in zip(encoded, sampling, names, strict=True):
            explicit = "max_new_tokens" in own.model_fields_set
            params = self._fitted(len(tokens), own.max_new_tokens, _of_sampling(own), explicit)
            logprobs = _checked_start(body.wanted_logprobs, len(tokens))
            asked += _choices(_Wanted(tokens, params, name, logprobs), own.n or 1)
        return self._opened(asked, body, body.priority or 0)

    async def of_completion(self, body: CompletionBody) -> list[NamedRequest]:
        """One for each prompt and choice, in order."""
        asked = []
        prompts = body.prompts
        names = _names(body.rid, len(prompts))
        special = body.add_special_tokens is not False
        encoded = await self._encode(prompts, special=special)
        for prompt, tokens, name in zip(prompts, encoded, names, strict=True):
            explicit = "max_tokens" in body.model_fields_set
            params = self._fitted(len(tokens), body.max_tokens, _of_openai(body), explicit)
            echo = ""
            if body.echo:
                echo = prompt if isinstance(prompt, str) else await self.text_of(tokens)
            wanted = _Wanted(tokens, params, name, body.wanted_logprobs, echo)
            asked += _choices(wanted, body.n or 1)
        return self._opened(asked, body, body.priority or 0)

    async def of_chat(self, body: ChatBody) -> list[NamedRequest]:
        """One for each choice."""
        text = await self._rendered(body.messages, body)
        tokens = await self._encoder.encode(text, special=bool(body.add_special_tokens))
        params = self._fitted(len(tokens), body.limit, _of_openai(body), explicit=True)
        wanted = _Wanted(tokens, params, body.rid, body.wanted_logprobs)
        return self._opened(_choices(wanted, body.n or 1), body, body.priority or 0)

    async def tokens_of(self, body: TokenizeBody) -> list[int]:
        """The tokens of a text or of a chat; a text may have none.

        Raises:
            Problem: the text is too long, or the template cannot render the messages.
        """
        is_chat = body.messages is not None
        text = await self._rendered(body.messages, body) if body.messages else body.prompt or ""
        special = not is_chat if body.add_special_tokens is None else body.add_special_tokens
        return list(await self._encoder.encode(text, special=special)) if text else []

    async def names_of(self, tokens: Sequence[int]) -> list[str]:
        """What the vocabulary calls each token."""
        ids = list(tokens)

        def named(tokenizer: Any) -> list[str]:
            return list(map(str, tokenizer.convert_ids_to_tokens(ids)))

        return await self._encoder.aside(named, len(ids))

    async def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens included.

        Raises:
            Problem: there is no such token.
        """
        ids = list(self._checked(tokens))

        def decoded(tokenizer: Any) -> str:
            return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

        return await self._encoder.aside(decoded, len(ids))

    async def _rendered(self, messages: Sequence[Message], how: Rendering) -> str:
        nbytes = sum(len(message.text) for message in messages)
        return await self._encoder.aside(
            lambda tokenizer: rendered(tokenizer, messages, how), nbytes
        )

    async def of_warm(self, prompts: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
        """The tokens of prompts that are not computed now.

        Raises:
            Problem: one has unknown ids, or would not fit into the context.
        """
        return await self._encode(prompts)

    def _opened(
        self,
        wanted: Sequence[_Wanted],
        body: Shared,
        priority: int,
    ) -> list[NamedRequest]:
        """Gives each its id; all or none."""
        room = None if self._rooms is None else self._room_of(self._rooms, wanted, body)
        namespace = namespace_of(body.cache_salt, body.extra_key)
        asked: list[NamedRequest] = []
        try:
            for one in wanted:
                name, request_id = self._names.open(one.name, namespace)
                request = Request(
                    request_id,
                    one.tokens,
                    one.sampling,
                    namespace,
                    priority,
                    room,
                    logprobs=one.logprobs,
                )
                asked.append(NamedRequest(name, request, one.echo))
        except Problem:
            for opened in asked:
                self._names.close(opened.name, namespace)
            raise
        return asked

    @staticmethod
    def _room_of(rooms: Rooms, wanted: Sequence[_Wanted], body: Shared) -> Bootstrap | None:
        """Where the halves of a request meet, on a node that computes one of them.

        Raises:
            Problem: it takes no such room, or only a node that computes both halves can do this.
        """
        room = rooms.room_of(body)
        if room is not None and len(wanted) != 1:
            raise Problem(400, f"a bootstrap_room is for one prompt; here are {len(wanted)}")
        if any(one.logprobs is not None or not one.sampling.max_new_tokens for one in wanted):
            raise Problem(
                400,
                "log probabilities, and answers of 0 tokens, are not supported where prefill and "
                "decode are on different nodes; ask a server without --disaggregation-mode",
            )
        return room

    def _fitted(
        self, n_prompt: int, max_new: int | None, sampling: SamplingParams, explicit: bool
    ) -> SamplingParams:
        """With as many new tokens as were asked, or as fit where nobody asked.

        Raises:
            Problem: the context is too short for it.
        """
        room = self._room(n_prompt)
        if max_new is None or (max_new > room and not explicit):
            max_new = room
        if max_new > room:
            raise Problem(
                400,
                f"{n_prompt} prompt tokens and {max_new} new tokens exceed this server's "
                f"context of {self.limits.context_length}",
            )
        if sampling.min_new_tokens > max_new:
            raise Problem(
                400,
                f"the minimum of {sampling.min_new_tokens} new tokens is above the maximum of "
                f"{max_new}",
            )
        return replace(sampling, max_new_tokens=max_new)

    def _room(self, n_prompt: int) -> int:
        room = self.limits.context_length - n_prompt
        if room < 1:
            raise Problem(
                400,
                f"the prompt has {n_prompt} tokens; with an answer, this server's context holds "
                f"{self.limits.context_length}",
            )
        return room

    async def _encode(
        self, prompts: Sequence[str | list[int]], *, special: bool = True
    ) -> list[tuple[int, ...]]:
        """Tokens of each, one after the other: between two, the prompts of others have a turn."""
        encoded = []
        for prompt in prompts:
            if isinstance(prompt, str):
                encoded.append(await self._encoder.encode(prompt, special=special))
            else:
                encoded.append(self._checked(prompt))
            self._room(len(encoded[-1]))
        return encoded

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        size = self.limits.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= size):
            wrong = next(token for token in ids if not 0 <= token < size)
            raise Problem(
                400, f"token id {wrong} does not exist in this model; ids are 0 to {size - 1}"
            )
        return tuple(ids)


def namespace_of(cache_salt: str | None, extra_key: str | None) -> Namespace:
    """Whose cache it is."""
    return Namespace(extra_key=extra_key, cache_salt=cache_salt)


def _of_sampling(body: SamplingBody) -> SamplingParams:
    return _params(body, body.sampling_seed, body.min_new_tokens)


def _of_openai(body: OpenAIBody) -> SamplingParams:
    return _params(body, body.seed, body.min_tokens)


def _params(
    body: SamplingBody | OpenAIBody, seed: int | None, min_new_tokens: int | None
) -> SamplingParams:
    """What both APIs call alike, and the two that they do not."""
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or -1,
        stop=_stops(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        seed=seed,
        ignore_eos=bool(body.ignore_eos),
        min_new_tokens=min_new_tokens or 0,
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _choices(wanted: _Wanted, n: int) -> list[_Wanted]:
    """``n`` answers to one prompt, each with a seed and a name of its own."""
    seed, name = wanted.sampling.seed, wanted.name
    return [
        replace(
            wanted,
            sampling=replace(wanted.sampling, seed=None if seed is None else seed + k),
            name=name if name is None or n == 1 else f"{name}_{k}",
        )
        for k in range(n)
    ]


def _checked_start(wanted: WantedLogprobs | None, n_prompt: int) -> WantedLogprobs | None:
    start = None if wanted is None else wanted.prompt_start
    if start is not None and start >= n_prompt:
        raise Problem(
            400,
            f"logprob_start_len is {start}; it must be below the {n_prompt} tokens of the prompt",
            param="logprob_start_len",
        )
    return wanted


def _check_length(given: Sequence[object], n: int, what: str) -> None:
    if len(given) != n:
        raise Problem(400, f"{what} has {len(given)} entries for {n} prompts", param=what)


def _names(rid: str | list[str] | None, n: int) -> list[str | None]:
    """A name for each prompt; one text for several is what their names begin with."""
    if rid is None:
        return [None] * n
    if isinstance(rid, str):
        return [rid] if n == 1 else [f"{rid}_{k}" for k in range(n)]
    _check_length(rid, n, "rid")
    return [*rid]
