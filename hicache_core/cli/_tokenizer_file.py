"""Token ids of a text by a folder's ``tokenizer.json`` alone, which takes no second to read.

transformers takes several, since it imports torch. It is left out only where it would do no more
than read that file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLASSES = {"TokenizersBackend", "PreTrainedTokenizerFast"}
"""Two names of the one class of transformers that takes the file as it is; others rebuild it."""

CHANGES = {"add_prefix_space", "auto_map", "fix_mistral_regex", "split_special_tokens"}
"""Settings with which transformers tokenizes otherwise than the file says."""

ENDS = {"add_bos_token", "add_eos_token"}
"""Settings that replace, true or false, what the file adds to a text; or not, by the version."""

_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def ids_by_file(folder: Path, text: str) -> list[int] | None:
    """The ids that transformers makes of ``text``, its special tokens included.

    Returns None where that takes more than the file, or ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return None
    file = folder / "tokenizer.json"
    settings = _settings(folder / "tokenizer_config.json")
    if settings is None or not file.is_file() or not _is_all_in_file(settings):
        return None
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception:  # the library raises nothing narrower; transformers will say what is wrong
        return None
    if any(tokenizer.token_to_id(token) is None for token in _named_tokens(settings)):
        return None  # transformers adds it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [int(token) for token in tokenizer.encode(text).ids]


def _settings(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_all_in_file(settings: dict[str, Any]) -> bool:
    changed = any(settings.get(key) for key in CHANGES) or settings.keys() & ENDS
    return settings.get("tokenizer_class") in CLASSES and not changed


def _named_tokens(settings: dict[str, Any]) -> list[str]:
    """Tokens that the settings name; transformers adds those that the file lacks."""
    named = [settings.get(f"{role}_token") for role in _TOKENS]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    named += (settings.get("added_tokens_decoder") or {}).values()
    texts = [token.get("content") if isinstance(token, dict) else token for token in named]
    return [str(text) for text in texts if text is not None]
