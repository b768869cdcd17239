"""The bodies of requests: what clients may send, checked before anything is done with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hicache_core.config.redact import MASK
from hicache_core.config.sources import EXTRA
from hicache_core.engine.request import Bootstrap, WantedLogprobs
from hicache_core.server.fields import refusal
from hicache_core.server.forms import (
    MAX_CHOICES,
    MAX_PROMPTS,
    MAX_TOKENS,
    AnyPrompt,
    Count,
    Name,
    OneOrManyIds,
    OneOrManyNames,
    OneOrManyStops,
    OneOrManyTexts,
    Priority,
    Seed,
    StopIds,
    Temperature,
    TopK,
    TopN,
    TopNOrFalse,
    TopP,
    one_or_many,
)
from hicache_core.server.problems import PARAM


def refused(field: str, reason: str) -> PydanticCustomError:
    """An error of a validator; ``field`` is the one that the client hears of."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, PARAM: field})


class Body(BaseModel):
    """A request body or a part of one. Unknown fields are refused unless they ask for nothing."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if reason := refusal(name, value, type(self).model_fields):
                raise refused(name, reason)
        return self


class Tenant(Body):
    """Fields that separate the caches of tenants."""

    cache_salt: Name | None = None
    extra_key: Name | None = None


class SamplingBody(Body):
    """``sampling_params`` of ``/generate``."""

    max_new_tokens: Count | None = 128
    min_new_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop: OneOrManyStops | None = None
    stop_token_ids: StopIds | None = None
    sampling_seed: Seed | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1


class Shared(Tenant):
    """A request that may be split between a prefill and a decode node.

    The router sets the fields ``bootstrap_*``, which have SGLang's names. ``bootstrap_proof`` shows
    that the router knows the secret of its nodes.
    """

    bootstrap_host: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    bootstrap_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    bootstrap_room: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    bootstrap_proof: Annotated[str, Field(max_length=255)] | None = None

    @property
    def bootstrap(self) -> Bootstrap | None:
        """All of it, or nothing."""
        host, port, room = self.bootstrap_host, self.bootstrap_port, self.bootstrap_room
        if host is None or port is None or room is None:
            return None
        return Bootstrap(host, port, room)


class Prompts(Body):
    """One of ``text`` and ``input_ids``, alone or as a batch."""

    text: OneOrManyTexts | None = None
    input_ids: OneOrManyIds | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("give either text or input_ids")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, alone or not."""
        if self.text is not None:
            return [self.text] if isinstance(self.text, str) else self.text
        given: list[Any] = list(self.input_ids or ())
        return given if isinstance(given[0], list) else [given]


class GenerateBody(Shared, Prompts):
    """``/generate``."""

    sampling_params: (
        Annotated[
            Annotated[SamplingBody, Tag("~one")]
            | Annotated[list[SamplingBody], Field(max_length=MAX_PROMPTS), Tag("~many")],
            Discriminator(one_or_many),
        ]
        | None
    ) = None
    stream: bool | None = False
    rid: OneOrManyNames | None = None
    priority: Priority | None = 0
    return_logprob: bool | None = False
    logprob_start_len: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = -1
    top_logprobs_num: TopN | None = 0
    return_text_in_logprobs: bool | None = False

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list."""
        given = self.text if self.text is not None else self.input_ids
        return isinstance(given, list) and not (given and isinstance(given[0], int))

    @property
    def wanted_logprobs(self) -> WantedLogprobs | None:
        """Of the answer, and of the prompt from ``logprob_start_len`` on; -1 is none of it."""
        if not self.return_logprob:
            return None
        start = -1 if self.logprob_start_len is None else self.logprob_start_len
        return WantedLogprobs(self.top_logprobs_num or 0, None if start < 0 else start)


class StreamOptions(Body):
    """What a stream reports about usage."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class OpenAIBody(Shared):
    """Fields of both OpenAI calls."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: OneOrManyStops | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    priority: Priority | None = 0
    rid: Name | None = None
    return_cached_tokens_details: bool | None = False


class CompletionBody(OpenAIBody):
    """``/v1/completions``."""

    prompt: AnyPrompt
    max_tokens: Count | None = 16
    logprobs: TopNOrFalse = None
    echo: bool | None = False
    add_special_tokens: bool | None = True

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, alone or not."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        given: list[Any] = list(self.prompt)
        return given if isinstance(given[0], str | list) else [given]

    @property
    def wanted_logprobs(self) -> WantedLogprobs | None:
        """Of the answer, and with ``echo`` of the prompt."""
        if self.logprobs is None:
            return None
        return WantedLogprobs(self.logprobs, 0 if self.echo else None)


class Part(BaseModel):
    """A part of a message; only text is supported."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _text_only(self) -> Self:
        if self.type != "text" or self.text is None:
            raise ValueError("only parts of the type text are supported")
        return self


class Message(BaseModel):
    """One message of a chat; unknown fields are ignored, since histories contain many."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("~one")]
            | Annotated[list[Part], Field(max_length=1024), Tag("~many")],
            Discriminator(one_or_many),
        ]
        | None
    ) = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required, as text or a list of parts")
        return self

    @property
    def text(self) -> str:
        """All text of it; empty where there is none."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or "" for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class Rendering(Body):
    """How the model's template renders a chat."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt contradict each other; set one"
            )
        return self


class ChatBody(OpenAIBody, Rendering):
    """``/v1/chat/completions``."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: TopN | None = 0
    add_special_tokens: bool | None = False
    tool_choice: Any = None
    tools: Any = None

    @model_validator(mode="after")
    def _no_tools(self) -> Self:
        # With tool_choice none no tool may be called, so that the answer is right without them.
        if self.tools and self.tool_choice != "none":
            raise refused(
                "tools",
                "tools is not supported by this server; leave it out, or set tool_choice to none",
            )
        if reason := refusal("tool_choice", self.tool_choice, ()):
            raise refused("tool_choice", reason)
        return self

    @model_validator(mode="after")
    def _logprobs_first(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @property
    def wanted_logprobs(self) -> WantedLogprobs | None:
        """Of the answer."""
        return WantedLogprobs(self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """The newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(Rendering):
    """``/tokenize``: one of ``prompt`` and ``messages``.

    ``add_special_tokens`` is true by default for a prompt; a template brings its own.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """``/detokenize``."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


class AttachBody(BaseModel):
    """``PUT /hicache/storage-backend``, with SGLang's fields or those that the GET returns.

    ``backends``, which the GET adds, is ignored.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    hicache_storage_backend: Name
    hicache_storage_backend_extra_config: dict[str, Any] | None = None
    hicache_storage_backend_extra_config_json: str | None = None
    hicache_storage_prefetch_policy: str | None = None
    hicache_write_policy: str | None = None
    backends: Any = None

    @model_validator(mode="after")
    def _once(self) -> Self:
        if self.hicache_storage_backend_extra_config is not None and (
            self.hicache_storage_backend_extra_config_json is not None
        ):
            raise ValueError(f"give {EXTRA} or {EXTRA}_json, not both")
        if is_masked(self.hicache_storage_backend_extra_config):
            raise ValueError(
                f"{EXTRA} has a value {MASK}, which hides a secret; give the secret itself"
            )
        return self

    @property
    def extra_config(self) -> dict[str, Any] | str:
        """The backend's settings, as a mapping or JSON text."""
        given = self.hicache_storage_backend_extra_config
        return given or self.hicache_storage_backend_extra_config_json or {}


def is_masked(value: object) -> bool:
    """Whether a setting, at any depth, is what a secret is shown as."""
    if isinstance(value, dict):
        return any(map(is_masked, value.values()))
    if isinstance(value, list):
        return any(map(is_masked, value))
    return value == MASK
