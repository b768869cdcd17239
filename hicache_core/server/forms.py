"""The forms of a field: one value or several, text or token ids; each with its limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo

LONGEST = "longest"
"""In the context of a validation: tokens of a prompt at most."""

MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_STOPS = 32
MAX_TOKENS = 1 << 24
MAX_TOP_LOGPROBS = 20

Name = Annotated[str, Field(min_length=1, max_length=1024)]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TopN = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
StopIds = Annotated[list[int], Field(max_length=1024)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=1 << 30)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Priority = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]


def _none_if_false(value: object) -> object:
    """For a number that some clients switch off with false."""
    return None if value is False else value


TopNOrFalse = Annotated[TopN | None, BeforeValidator(_none_if_false)]


def _fits(value: object, info: ValidationInfo) -> object:
    """Refuses a prompt by its length, before its tokens are looked at one by one."""
    longest = (info.context or {}).get(LONGEST)
    if longest is not None and isinstance(value, list) and len(value) > longest:
        raise ValueError(
            f"the prompt has {len(value)} tokens; with an answer, this server's context holds "
            f"{longest}"
        )
    return value


TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True), BeforeValidator(_fits)]


def _form(value: object) -> str:
    """Which of several forms a value has; the tags are for pydantic and shown to nobody."""
    if not isinstance(value, list):
        return "~one"
    first = value[0] if value else None
    if isinstance(first, list):
        return "~lists"
    return "~ids" if isinstance(first, int) else "~many"


def _form_of_ids(value: object) -> str:
    return "~lists" if _form(value) == "~lists" else "~ids"


def one_or_many(value: object) -> str:
    """The tag of a value that may be a list."""
    return "~many" if isinstance(value, list) else "~one"


_Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
_Lists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
OneOrManyTexts = Annotated[
    Annotated[Text, Tag("~one")] | Annotated[_Texts, Tag("~many")], Discriminator(one_or_many)
]
OneOrManyIds = Annotated[
    Annotated[TokenIds, Tag("~ids")] | Annotated[_Lists, Tag("~lists")],
    Discriminator(_form_of_ids),
]
AnyPrompt = Annotated[
    Annotated[Text, Tag("~one")]
    | Annotated[_Texts, Tag("~many")]
    | Annotated[TokenIds, Tag("~ids")]
    | Annotated[_Lists, Tag("~lists")],
    Discriminator(_form),
]
OneOrManyStops = Annotated[
    Annotated[Stop, Tag("~one")] | Annotated[Stops, Tag("~many")], Discriminator(one_or_many)
]
OneOrManyNames = Annotated[
    Annotated[Name, Tag("~one")]
    | Annotated[list[Name], Field(max_length=MAX_PROMPTS), Tag("~many")],
    Discriminator(one_or_many),
]
