"""Traces: recorded requests, in the formats in which they are published.

=================  ========================================================================
Mooncake           a JSON object a line: ``timestamp`` in ms, ``input_length``,
                   ``output_length``, ``hash_ids`` of the blocks of 512 tokens of the prompt
Bailian (Qwen)     the same with ``chat_id``: ``timestamp`` in seconds, blocks of 16 tokens
kv-cache-tester    an object a conversation: ``block_size`` and ``requests``, each with ``t``
                   in seconds, ``in``, ``out`` and the ``hash_ids`` of its whole blocks
ShareGPT           a list of objects with ``conversations``: turns of ``from`` and ``value``
SGLang, custom     an object a line with ``conversations`` of ``content``: question and answer
vLLM, multi-turn   objects with ``messages`` of ``role`` and ``content``, as of OpenAI's API
vLLM, custom       an object a line with ``prompt``, and ``output_tokens`` if it is known
results of both    ``input_lens`` and ``output_lens`` of a benchmark: lengths only
Azure, BurstGPT    CSV with the lengths of prompts and answers (see ``lengths.py``)
=================  ========================================================================

The fields of an object tell its format. Equal ids are equal blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from hicache_core.bench.lengths import (
    BLOCK_TOKENS,
    Lengths,
    Sharing,
    blocks_for,
    check_lengths,
    read_csv,
)
from hicache_core.errors import ConfigError

OUTPUT_TOKENS = 256
"""Tokens of an answer of which a trace of texts does not tell the length."""

TimeUnit = Literal["ms", "s"]

_SECONDS: dict[TimeUnit, float] = {"ms": 0.001, "s": 1.0}
_USUAL_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at_s: when it arrives, in seconds of the trace.
        input_length: tokens of the prompt; of a text, its words.
        output_length: tokens of the answer; of a text, its words.
        blocks: names of the blocks that the prompt consists of; the last may be cut short.
        block_tokens: tokens of a whole block.
        session: requests of one session are sent one after another; empty for none.
        text: the prompt itself, where the trace has it; then there are no blocks.
    """

    at_s: float
    input_length: int
    output_length: int
    blocks: tuple[str, ...] = ()
    block_tokens: int = 1
    session: str = ""
    text: str = ""


def read_trace(
    path: Path,
    limit: int | None = None,
    *,
    block_tokens: int | None = None,
    time_unit: TimeUnit | None = None,
    sharing: Sharing | None = None,
) -> list[TraceRequest]:
    """The requests of a trace file in the order of their arrival, the first ``limit`` of them.

    Args:
        path: the file.
        limit: number of requests; None for all.
        block_tokens: tokens in a block; by default that of the format.
        time_unit: of the timestamps; by default that of the format.
        sharing: the prefixes that prompts get of which the trace has the lengths only.

    Raises:
        ConfigError: it cannot be read, has an unknown format, is not sorted by time, or its
            lengths do not fit its blocks; the message names the line.
    """
    requests = [TraceRequest(*one) for one in read_csv(path, limit)] if _is_csv(path) else []
    for where, item in () if _is_csv(path) else _objects(path):
        found = _checked(where, _requests(where, item, block_tokens, time_unit))
        requests += found
        if limit and len(requests) >= limit and not any(one.session for one in found):
            break  # a line is a request; conversations overlap, so all of them are read
    if not requests:
        raise ConfigError(f"the trace {path} has no requests")
    if any(request.session for request in requests):
        requests.sort(key=lambda request: request.at_s)
    for first, second in pairwise(requests):
        if second.at_s < first.at_s:
            raise ConfigError(f"the trace {path} is not sorted by its timestamps")
    return _with_prefixes(requests[:limit], sharing or Sharing())


def _checked(where: str, requests: list[TraceRequest]) -> list[TraceRequest]:
    for one in requests:
        try:
            check_lengths(one.at_s, one.input_length, one.output_length)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    return requests


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _with_prefixes(requests: list[TraceRequest], sharing: Sharing) -> list[TraceRequest]:
    """The requests; those that have neither blocks nor a text get blocks."""
    bare = [one for one in requests if not one.blocks and not one.text]
    lengths = [Lengths(one.at_s, one.input_length, one.output_length) for one in bare]
    made = blocks_for(lengths, sharing)
    return [
        one
        if one.blocks or one.text
        else replace(one, blocks=next(made), block_tokens=BLOCK_TOKENS)
        for one in requests
    ]


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file (one JSON value, or one on each line), each with its location."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    for where, item in _values(path, text):
        if not isinstance(item, dict):
            raise ConfigError(f"{where}: expected a JSON object, found {json.dumps(item)[:60]}")
        yield where, item


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        whole = json.loads(text)
    except RecursionError:
        raise ConfigError(f"the trace {path} is nested too deeply") from None
    except ValueError:  # then there is one a line
        for n, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{path}, line {n}", _parsed(f"{path}, line {n}", line)
        return
    items = whole if isinstance(whole, list) else [whole]
    for n, item in enumerate(items, 1):
        yield f"{path}, object {n}", item


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from error


def _requests(
    where: str, item: dict[str, Any], block_tokens: int | None, time_unit: TimeUnit | None
) -> list[TraceRequest]:
    """The requests of one object."""
    try:
        for name in ("conversations", "messages"):
            if name in item:
                return _chat(where, item, item[name])
        if "prompt" in item:
            return [_prompt(item)]
        if "input_lens" in item:
            pairs = zip(item["input_lens"], item["output_lens"], strict=True)
            return [TraceRequest(0.0, int(n), max(1, int(n_out))) for n, n_out in pairs]
        if "requests" in item:
            return _conversation(where, item, block_tokens, time_unit)
        if "hash_ids" in item:
            return [_line(where, item, block_tokens, time_unit)]
    except ConfigError:
        raise
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: a field is missing or wrong: {error!r}") from error
    raise ConfigError(
        f"{where}: unknown trace format with the fields {', '.join(item) or 'none'}; the known "
        "formats are Mooncake's and Bailian's (hash_ids), kv-cache-tester's (requests), ShareGPT's "
        "and SGLang's (conversations), vLLM's (messages, prompt), results of both (input_lens), "
        "and CSV files of Azure and BurstGPT"
    )


def _line(
    where: str, item: dict[str, Any], block_tokens: int | None, time_unit: TimeUnit | None
) -> TraceRequest:
    """A line of Mooncake's form or of Bailian's; the last block may be cut short."""
    is_bailian = "chat_id" in item
    block_tokens = block_tokens or (16 if is_bailian else 512)
    at = float(item["timestamp"])
    if time_unit is None and not is_bailian and not at.is_integer():
        raise ConfigError(
            f"{where}: timestamp {at} is not a whole number of milliseconds; give --time-unit s "
            "if it is in seconds, otherwise --time-unit ms"
        )
    unit: TimeUnit = time_unit or ("s" if is_bailian else "ms")
    blocks = tuple(map(str, map(int, item["hash_ids"])))
    n_tokens = int(item["input_length"])
    if not block_tokens * (len(blocks) - 1) < n_tokens <= block_tokens * len(blocks):
        raise _misfit(where, n_tokens, len(blocks), block_tokens)
    n_output = int(item["output_length"])
    return TraceRequest(at * _SECONDS[unit], n_tokens, n_output, blocks, block_tokens)


def _misfit(where: str, n_tokens: int, n_blocks: int, block_tokens: int) -> ConfigError:
    fitting = [
        size for size in _USUAL_BLOCKS if size * (n_blocks - 1) < n_tokens <= size * n_blocks
    ]
    hint = ""
    if fitting and n_blocks > 1:
        hint = f"; if its blocks have {fitting[0]} tokens, give --trace-block-tokens {fitting[0]}"
    return ConfigError(
        f"{where}: {n_tokens} tokens do not fit {n_blocks} blocks of {block_tokens}{hint}"
    )


def _conversation(
    where: str, item: dict[str, Any], block_tokens: int | None, time_unit: TimeUnit | None
) -> list[TraceRequest]:
    """A conversation of kv-cache-tester, its sub-agents as sessions of their own.

    Its ids name whole blocks only: what is left of a prompt is the request's own. They are valid
    inside the conversation, or everywhere if ``hash_id_scope`` is ``global``.
    """
    session = str(item.get("id", where))
    scope = "" if item.get("hash_id_scope") == "global" else f"{session}/"
    size = block_tokens or int(item["block_size"])
    scale = _SECONDS[time_unit or "s"]
    found = []
    for n, (name, fields) in enumerate(_flat(session, item["requests"])):
        blocks = tuple(f"{scope}{int(id_)}" for id_ in fields["hash_ids"])
        n_tokens = int(fields["in"])
        n_rest = n_tokens - size * len(blocks)
        if not 0 <= n_rest < size:
            raise ConfigError(
                f"{where}, request {n + 1}: {n_tokens} tokens do not fit {len(blocks)} whole "
                f"blocks of {size}"
            )
        if n_rest:
            blocks += (f"{session}/rest/{n}",)
        at_s, n_output = float(fields["t"]) * scale, int(fields["out"])
        found.append(TraceRequest(at_s, n_tokens, n_output, blocks, size, name))
    return sorted(found, key=lambda request: request.at_s)


def _flat(session: str, requests: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every request with its session; ``requests`` inside one are those of a sub-agent."""
    for n, fields in enumerate(requests):
        if "requests" in fields:
            yield from _flat(f"{session}/{n}", fields["requests"])
        else:
            yield session, fields


def _chat(where: str, item: dict[str, Any], turns: Sequence[dict[str, Any]]) -> list[TraceRequest]:
    """A conversation: before each answer a request with all that was said.

    A list of messages that ends with a question is a request, too.
    """
    session = f"{where}/{item.get('id', '')}"
    found = []
    said, is_answer = "", False
    for n, turn in enumerate(turns):
        value = _value(turn)
        who = turn.get("from", turn.get("role", ("user", "assistant")[n % 2]))
        is_answer = who in ("gpt", "assistant")
        if is_answer and said:
            n_words = len(said.split())
            n_output = max(1, len(value.split()))
            found.append(TraceRequest(0.0, n_words, n_output, session=session, text=said))
        said = f"{said} {value}"
    if "messages" in item and said and not is_answer:
        n_output = int(item.get("max_tokens") or OUTPUT_TOKENS)
        found.append(TraceRequest(0.0, len(said.split()), n_output, session=session, text=said))
    return found


def _value(turn: dict[str, Any]) -> str:
    """What was said, with single spaces; of a message of several parts, its texts."""
    value = turn["value"] if "value" in turn else turn["content"]
    if isinstance(value, list):
        value = " ".join(str(part["text"]) for part in value if "text" in part)
    return " ".join(str(value).split())


def _prompt(item: dict[str, Any]) -> TraceRequest:
    """A line of vLLM's custom dataset."""
    text = " ".join(str(item["prompt"]).split())
    n_output = int(item.get("output_tokens") or OUTPUT_TOKENS)
    return TraceRequest(0.0, len(text.split()), n_output, text=text)


def scaled(request: TraceRequest, block_words: int | None) -> TraceRequest:
    """The request with blocks of so many words, and all its lengths shrunk with them."""
    if request.text or block_words is None or block_words == request.block_tokens:
        return request
    scale = block_words / request.block_tokens
    return replace(
        request,
        input_length=max(1, round(request.input_length * scale)),
        output_length=max(1, round(request.output_length * scale)),
        block_tokens=block_words,
    )
