"""Validation errors as sentences: the key, the value, its source, and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hicache_core.config.redact import masked
from hicache_core.config.sources import ARGUMENT, EXTRA, nearest
from hicache_core.errors import ConfigError

# Settings of SGLang's stores that have no counterpart of their own, and what is done here instead.
_OF_SGLANG = {
    "extra_backend_tag": "give each store a path, prefix or tenant of its own",
    "min_free_space": "set the size of the store with max_nbytes",
    "check_server": "leave it out: opening a store always checks the server",
}


def allowed_values(model: type[BaseModel], key: str) -> str:
    """In words, the values that setting ``key`` of ``model`` allows; empty if that is unknown."""
    info = model.model_fields[key]
    if isinstance(info.json_schema_extra, dict) and "allowed" in info.json_schema_extra:
        return str(info.json_schema_extra["allowed"])
    if info.annotation is bool:
        return "true or false"
    if get_origin(info.annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(info.annotation))
    return ""


def config_error(
    error: ValidationError,
    model: type[BaseModel],
    sources: Mapping[str, str] | None = None,
    prefix: str = "",
) -> ConfigError:
    """Rewrites ``error`` with one clause for each setting, and without secrets.

    Args:
        error: what pydantic raised when ``model`` was validated.
        model: the settings, for the names and values that they allow.
        sources: where each value came from, if that is known.
        prefix: put before each key, such as ``backend_config.``.
    """
    found = error.errors(include_url=False, include_context=False)
    details = [detail for detail in found if not _follows(detail, found)]
    clauses = [_explain(detail, model, sources or {}, prefix) for detail in details]
    return ConfigError("; ".join(clauses))


def _explain(
    detail: ErrorDetails, model: type[BaseModel], sources: Mapping[str, str], prefix: str
) -> str:
    if not detail["loc"]:  # a rule over several settings: its message names them
        return f"{prefix.rstrip('.')}: {_message(detail)}" if prefix else _message(detail)
    first = str(detail["loc"][0])
    path = prefix + ".".join(str(part) for part in detail["loc"])
    source = sources.get(prefix.rstrip(".") or first, "")
    model, key = _owner(model, detail["loc"])
    where = f" (from {source})" if source and source != ARGUMENT else ""
    if key in _OF_SGLANG and detail["type"] == "extra_forbidden":
        return f"{path}{where}: this setting exists in SGLang only; {_OF_SGLANG[key]}"
    if detail["type"] == "extra_forbidden":
        hint = nearest(key, model.model_fields)
        names = "" if hint else f"; the settings are: {', '.join(model.model_fields) or 'none'}"
        return f"{path}{where}: unknown setting{hint}{names}"
    if detail["type"] == "missing":
        return f"{path}{where}: this setting is required{_meaning(model, key)}"
    if first in (EXTRA, "backend_config"):  # may be text that holds passwords: not quoted
        return f"{path}{where}: {_message(detail)}"
    shown = repr(masked(masked(detail["input"], first), key))
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    allowed = allowed_values(model, key) if key in model.model_fields else ""
    hint = nearest(str(detail["input"]), allowed.split(", "))
    return f"{path} = {shown}{where}: " + (
        f"allowed: {allowed}{hint}" if allowed else _message(detail)
    )


def _follows(detail: ErrorDetails, found: Sequence[ErrorDetails]) -> bool:
    """Whether a list is too short only because items of it are wrong: those are in ``found``."""
    loc = detail["loc"]
    inside = any(len(one["loc"]) > len(loc) and one["loc"][: len(loc)] == loc for one in found)
    return detail["type"] == "too_short" and inside


def _owner(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """The settings that have the innermost setting named in ``loc``, and its name there."""
    key = str(loc[0])
    for part in loc[1:]:
        info = model.model_fields.get(key)
        inner = None if info is None else _model_in(info.annotation)
        if inner is None:
            break
        if isinstance(part, str):
            model, key = inner, part
    return model, key


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The settings that a field of this type holds, itself or in a container; None if none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _meaning(model: type[BaseModel], key: str) -> str:
    info = model.model_fields.get(key)
    return f" ({info.description})" if info is not None and info.description else ""


def _message(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ")
