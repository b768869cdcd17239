"""Chat: from messages to the text that the model's template makes of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from hicache_core.server.bodies import Message, Rendering
from hicache_core.server.problems import Problem

_RESERVED = frozenset(["messages", "tools", "documents", "tokenize"])
# What a template raises that meets what it does not expect.
_UNEXPECTED = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def rendered(tokenizer: Any, messages: Sequence[Message], how: Rendering) -> str:
    """The prompt of a chat.

    Args:
        tokenizer: that of the model, with its template.
        messages: of the chat.
        how: what the client says about the template.

    Raises:
        Problem: the model has no template, or its template cannot render the messages.
    """
    template = tokenizer.chat_template
    if not template:
        raise Problem(400, "this model has no chat template; use /v1/completions")
    variables = dict(how.chat_template_kwargs or {})
    for name in variables:
        if name in _RESERVED or name in inspect.signature(tokenizer.apply_chat_template).parameters:
            raise Problem(
                400,
                f"chat_template_kwargs: clients must not set {name!r}",
                param="chat_template_kwargs",
            )
    if how.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", how.reasoning_effort)
    adds = how.add_generation_prompt
    try:
        text: str = tokenizer.apply_chat_template(
            _as_template_takes_them(messages, knows_tools="tool_calls" in str(template)),
            tokenize=False,
            add_generation_prompt=not how.continue_final_message if adds is None else adds,
            continue_final_message=bool(how.continue_final_message),
            **variables,
        )
    except _UNEXPECTED as error:
        raise Problem(
            400,
            f"the model's chat template cannot render these messages: {error}",
            param="messages",
        ) from None
    return text


def _as_template_takes_them(
    messages: Sequence[Message], *, knows_tools: bool
) -> list[dict[str, Any]]:
    """Messages as templates know them; ``developer`` is OpenAI's newer word for ``system``.

    A template that has no word for calls of tools gets them as JSON in the text, so that what was
    said is not lost.
    """
    taken = []
    for message in messages:
        one: dict[str, Any] = message.model_dump(exclude_none=True)
        one["role"] = "system" if message.role == "developer" else message.role
        one["content"] = message.text
        if message.tool_calls:
            calls = [_parsed(call) for call in message.tool_calls]
            if knows_tools:
                one["tool_calls"] = calls
            else:
                del one["tool_calls"]
                lines = [json.dumps(call.get("function", call)) for call in calls]
                one["content"] = "\n".join([*filter(None, [message.text]), *lines])
        taken.append(one)
    return taken


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as a mapping, as templates take them; clients send JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}
