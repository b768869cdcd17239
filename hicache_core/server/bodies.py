"""The bodies of requests: what clients may send, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request

from hicache_core.engine.request import Bootstrap
from hicache_core.server.connections import body_taken
from hicache_core.server.problems import Problem

MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_STOPS = 32
MAX_TOKENS = 1 << 24

Name = Annotated[str, Field(min_length=1, max_length=1024)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[int], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
StopIds = Annotated[list[int], Field(max_length=1024)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=1 << 30)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Priority = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]

# What this server cannot do, and the values by which a client does not ask for it; None, False
# and empty values never do.
_NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "audio_data": (),
        "beam_width": (1,),
        "best_of": (1,),
        "custom_logit_processor": (),
        "ebnf": (),
        "echo": (),
        "frequency_penalty": (0,),
        "functions": (),
        "image_data": (),
        "input_embeds": (),
        "json_schema": (),
        "logit_bias": (),
        "logprobs": (),
        "lora_path": (),
        "min_p": (0,),
        "no_stop_trim": (),
        "presence_penalty": (0,),
        "regex": (),
        "repetition_penalty": (1,),
        "response_format": ({"type": "text"},),
        "return_hidden_states": (),
        "return_logprob": (),
        "return_routed_experts": (),
        "stop_regex": (),
        "structural_tag": (),
        "suffix": (),
        "token_ids_logprob": (),
        "tools": (),
        "top_logprobs": (0,),
        "top_logprobs_num": (0,),
        "video_data": (),
    }
)

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A body, or a part of one. Unknown fields are ignored; what we cannot do is refused."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = _NOT_SUPPORTED

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in self.NOT_SUPPORTED and not _is_harmless(value, self.NOT_SUPPORTED[name]):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return self


def _is_harmless(value: Any, allowed: tuple[object, ...]) -> bool:
    if isinstance(value, list):
        return all(_is_harmless(item, allowed) for item in value)
    return not value or value in allowed


class Tenant(Body):
    """What separates the caches of those who share a server."""

    cache_salt: Name | None = None
    extra_key: Name | None = None


class SamplingBody(Body):
    """``sampling_params`` of ``/generate``."""

    max_new_tokens: Count | None = 128
    min_new_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: StopIds | None = None
    sampling_seed: Seed | None = None
    ignore_eos: bool | None = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1


class Shared(Tenant):
    """Where the two halves of a disaggregated request meet; SGLang's names. Routers fill them.

    ``bootstrap_proof`` is our router's: that it knows the secret of its nodes.
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


class GenerateBody(Shared):
    """``/generate``: one of ``text`` and ``input_ids``, alone or as a batch."""

    text: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    input_ids: (
        TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)] | None
    ) = None
    sampling_params: (
        SamplingBody | Annotated[list[SamplingBody], Field(max_length=MAX_PROMPTS)] | None
    ) = None
    stream: bool | None = False
    rid: Name | Annotated[list[Name], Field(max_length=MAX_PROMPTS)] | None = None
    priority: Priority | None = 0

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

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list."""
        given = self.text if self.text is not None else self.input_ids
        return isinstance(given, list) and not (given and isinstance(given[0], int))


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: bool | None = False


class OpenAIBody(Shared):
    """What both OpenAI calls have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool | None = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    priority: Priority | None = 0
    rid: Name | None = None
    return_cached_tokens_details: bool | None = False

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(OpenAIBody):
    """``/v1/completions``."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Count | None = 16

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, alone or not."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        given: list[Any] = list(self.prompt)
        return given if isinstance(given[0], str | list) else [given]


class Part(Body):
    """A piece of a message; text is all that we read."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _text_only(self) -> Self:
        if self.type != "text" or self.text is None:
            raise ValueError("only parts of the type text are supported")
        return self


class Message(Body):
    """One message of a chat."""

    role: Annotated[str, Field(pattern="^(system|developer|user|assistant|tool)$")]
    content: str | Annotated[list[Part], Field(max_length=1024)]

    @property
    def as_template_takes_it(self) -> dict[str, str]:
        """Role and text; ``developer`` is OpenAI's newer word for ``system``."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text or "" for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(OpenAIBody):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None

    @property
    def limit(self) -> int | None:
        """The newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class AttachBody(Body):
    """``PUT /hicache/storage-backend``, in SGLang's shape."""

    hicache_storage_backend: Name
    hicache_storage_backend_extra_config_json: str | None = None
    hicache_storage_prefetch_policy: str | None = None
    hicache_write_policy: str | None = None


async def read_body(request: Request, body_class: type[B], max_nbytes: int) -> B:
    """The body of a request.

    Raises:
        Problem: 413 for one that is too large.
        ValidationError: it is no JSON, no UTF-8, or not what ``body_class`` says.
    """
    too_large = Problem(413, f"the body is larger than {max_nbytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_nbytes:
        raise too_large
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > max_nbytes:
            raise too_large
    try:
        return body_class.model_validate_json(raw)
    finally:
        body_taken(request.scope)
