"""Request and Output: what an engine is asked, and what it answers. Frozen, without behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from hicache_core.observe.tracing import Origin
from hicache_core.types import CachedTokens, Namespace

__all__ = [
    "Bootstrap",
    "CachedTokens",
    "Output",
    "Request",
    "SamplingParams",
    "Times",
    "TokenLogprobs",
    "WantedLogprobs",
]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_new_tokens: tokens at most; fewer where context or device pool end before. 0 computes
            the prompt, stores its prefix and answers nothing.
        temperature: 0 takes the most probable token; else what logits are divided by.
        top_p: the most probable tokens that together have at least this probability; (0, 1].
        top_k: so many of the most probable tokens; -1 for all.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, beside the model's own.
        seed: equal seeds give equal answers, whatever runs beside; None for one by chance.
        ignore_eos: the model's own end-of-sequence tokens do not end the answer.
        min_new_tokens: before so many tokens, nothing ends the answer but ``max_new_tokens``.
        skip_special_tokens: True to leave special tokens out of the text.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    min_new_tokens: int = 0
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class WantedLogprobs:
    """Which log probabilities a client wants: those of the answer, and perhaps of the prompt.

    They come from the model's own logits, before its rules, temperature, ``top_p`` and ``top_k``.

    Attributes:
        top_n: number of the most probable tokens to tell at each position.
        prompt_start: position of the first token of the prompt to tell of; None for none of them.
            The prompt is computed from there on, whatever the caches have of it.
    """

    top_n: int = 0
    prompt_start: int | None = None


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position.

    Attributes:
        token: id of the token there.
        logprob: its own; None for the first token of which a prompt tells.
        top: the most probable tokens and theirs, the most probable first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Where the two halves of a disaggregated request meet.

    Attributes:
        host: of the prefill node.
        port: of its bootstrap server.
        room: number of the request, equal on both sides.
    """

    host: str
    port: int
    room: int


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered.

    Attributes:
        request_id: unique among the requests that have not ended.
        tokens: the prompt, at least one token.
        sampling: how to answer.
        namespace: tenant and adapter; prefixes are shared inside a namespace only.
        priority: higher is scheduled first, and stays longer under the eviction policy `priority`.
        bootstrap: of a disaggregated request; the engine hands it on and does nothing with it.
        origin: whose it is in traces; None for nobody's.
        logprobs: which log probabilities the outputs have; None for none.
    """

    request_id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    namespace: Namespace = field(default_factory=Namespace)
    priority: int = 0
    bootstrap: Bootstrap | None = None
    origin: Origin | None = None
    logprobs: WantedLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """When things happened, by the engine's clock; 0.0 for what has not.

    Attributes:
        arrived: ``submit`` was called.
        first_scheduled: it left the waiting queue for the first time.
        first_token: the first new token was there.
        finished: the last one was.
    """

    arrived: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought for one request.

    Attributes:
        request_id: whose it is.
        new_tokens: tokens of this step; an end-of-sequence or stop token is among them.
        text: what they add to the text: whole characters, no special tokens, and nothing that may
            still turn out to be the beginning of a stop text.
        finish_reason: None while more is to come; ``stop``, ``length``, ``abort`` or ``error``.
        error: what went wrong, for the client; empty unless ``finish_reason`` is ``error``.
        prompt_tokens: length of the prompt.
        completion_tokens: new tokens so far.
        cached: tokens of the prompt that were not computed, by where they were at admission.
        times: when things happened.
        logprobs: of each of ``new_tokens``, if the request wants them.
        prompt_logprobs: of the prompt, from ``prompt_start`` on; the first output has them all.
    """

    request_id: str
    new_tokens: tuple[int, ...]
    text: str
    finish_reason: str | None
    error: str
    prompt_tokens: int
    completion_tokens: int
    cached: CachedTokens
    times: Times
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
