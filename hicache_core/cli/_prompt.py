"""A prompt on the command line: token ids, or a text with a tokenizer."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from hicache_core.errors import ConfigError
from hicache_core.kv.keys import pack_tokens

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
    if prompt.startswith("@"):
        try:
            prompt = Path(prompt[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the file of the prompt: {error}") from None
    ids = _ids(prompt)
    if ids is None:
        ids = _encoded(prompt, tokenizer)
    return pack_tokens(ids)


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
