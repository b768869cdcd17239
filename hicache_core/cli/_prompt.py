"""A prompt on the command line: token ids, or a text and a tokenizer."""

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
        prompt: ids with commas between them, a JSON list of ids, a text, or ``@file`` with any of
            them in it.
        tokenizer: folder of the tokenizer; needed for a text.

    Raises:
        ConfigError: a file cannot be read, or there is no tokenizer for a text.
        InvalidTokens: an id is no token id.
    """
    if prompt.startswith("@"):
        try:
            prompt = Path(prompt[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the prompt's file cannot be read: {error}") from None
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
            "the prompt is a text: add --tokenizer FOLDER (or --model with a tokenizer in it), or "
            "give token ids with commas between them"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "a text needs transformers to be tokenized; run: pip install 'hicache-core[engine]'"
        )
    from hicache_core.engine.tokenizer import encode

    return encode(tokenizer, text)
