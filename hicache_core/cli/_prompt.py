"""A prompt on the command line: token ids, or a text with a tokenizer."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TypeAlias

from hicache_core.errors import ConfigError
from hicache_core.kv.keys import pack_tokens

Prompt: TypeAlias = str | list[int]
"""A text, or token ids."""

_IDS = re.compile(r"\s*\d+(\s*,\s*\d+)*\s*,?\s*")


def packed_prompt(prompt: str, tokenizer: Path | None) -> bytes:
    """The packed token ids of a prompt.

    Args:
        prompt: ids separated by commas, a JSON list of ids, a text, or ``@file`` with one of
            these in it.
        tokenizer: folder of the tokenizer; needed only for a text.

    Raises:
        ConfigError: the file cannot be read, or a text has no tokenizer.
        InvalidTokens: an id is not a token id.
    """
    return packed(given_prompt(prompt), tokenizer)


def given_prompt(prompt: str) -> Prompt:
    """The prompt that an argument is: ids, a text, or what ``@file`` has in it.

    Raises:
        ConfigError: the file cannot be read.
    """
    if prompt.startswith("@"):
        prompt = _read(Path(prompt[1:]))
    ids = _ids(prompt)
    return prompt if ids is None else ids


def prompts_in(file: Path) -> list[Prompt]:
    """The prompts of a file, one a line; empty lines do not count.

    A line is JSON (a text, a list of ids, or an object with ``prompt``, ``text`` or ``input_ids``),
    or a text as it is.

    Raises:
        ConfigError: the file cannot be read, or a line is JSON of another form.
    """
    lines = enumerate(_read(file).splitlines(), 1)
    return [_of_line(line, f"{file}:{n}") for n, line in lines if line.strip()]


def packed(prompt: Prompt, tokenizer: Path | None) -> bytes:
    """The packed token ids of a prompt; ``tokenizer`` as of ``packed_prompt``.

    Raises:
        ConfigError: a text has no tokenizer.
        InvalidTokens: an id is not a token id.
    """
    return pack_tokens(_encoded(prompt, tokenizer) if isinstance(prompt, str) else prompt)


def _read(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the file of the prompt: {error}") from None


def _of_line(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError:
        return line
    if isinstance(found, dict):
        names = [name for name in ("prompt", "text", "input_ids") if name in found]
        found = found[names[0]] if len(names) == 1 else None
    if isinstance(found, str | list):
        return found
    raise ConfigError(
        f"{where}: a prompt is a text, a list of token ids, or an object with one of prompt, text "
        "and input_ids"
    )


def _ids(prompt: str) -> list[int] | None:
    if _IDS.fullmatch(prompt):
        return [int(word) for word in prompt.split(",") if word.strip()]
    if not prompt.lstrip().startswith("["):
        return None
    try:
        found = json.loads(prompt)
    except ValueError:
        return None  # a text that begins with a bracket
    return found if isinstance(found, list) else None


def _encoded(text: str, tokenizer: Path | None) -> list[int]:
    if tokenizer is None:
        raise ConfigError(
            "the prompt is a text: add --tokenizer FOLDER (or a --model folder that has a "
            "tokenizer), or give token ids separated by commas"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "tokenizing a text needs transformers: pip install 'hicache-core[engine]'"
        )
    from hicache_core.engine.tokenizer import encode

    return encode(tokenizer, text)
