"""Token ids of a text, by a tokenizer in a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hicache_core.errors import ConfigError


def encode(folder: Path, text: str) -> list[int]:
    """The ids that the folder's tokenizer makes of ``text``, its special tokens included.

    Raises:
        ConfigError: the folder holds no tokenizer.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer: {error}") from None
    return [int(token) for token in tokenizer(text)["input_ids"]]
