"""Token ids of a text, by a tokenizer in a local folder.

To load a tokenizer takes transformers ten seconds and more, nearly all of them for its own import.
What it makes of the folder is therefore kept as one file, which the ``tokenizers`` library reads
alone: the files of the folder would not do, since transformers builds the tokenizers of many models
anew and takes only parts of them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hicache_core.engine.user_cache import user_cache
from hicache_core.errors import ConfigError

_SUFFIXES = (".json", ".txt", ".model", ".tiktoken")
"""Of files that a tokenizer may consist of."""

_PROBE = " A  text,\n with \t spaces, é 漢字 🙂 12345.678 don't "


def encode(folder: Path, text: str) -> list[int]:
    """The ids that the folder's tokenizer makes of ``text``, its special tokens included.

    Raises:
        ConfigError: the folder holds no tokenizer.
    """
    kept = _kept(folder)
    if kept.is_file():
        try:
            return list(Tokenizer.from_file(str(kept)).encode(text).ids)
        except Exception:  # what tokenizers raises for a damaged file; it is written anew
            kept.unlink(missing_ok=True)
    return _encode_by_transformers(folder, text)


def remember(folder: Path, tokenizer: Any) -> None:
    """Keeps a tokenizer for ``encode``, unless it does more than its backend.

    Args:
        folder: from which it was loaded.
        tokenizer: as transformers loaded it.
    """
    kept = _kept(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if kept.is_file() or backend is None:
        return
    alone = Tokenizer.from_str(backend.to_str())
    alone.no_truncation()
    alone.no_padding()
    probe = _PROBE + "".join(tokenizer.all_special_tokens)
    if alone.encode(probe).ids != tokenizer(probe)["input_ids"]:
        return
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=kept.parent)
        os.close(descriptor)
        alone.save(name, pretty=False)
        Path(name).replace(kept)
    except OSError:
        return  # transformers is asked again next time


def _kept(folder: Path) -> Path:
    """The file for the folder as it is now."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
    versions = "-".join(
        f"{name}-{metadata.version(name)}" for name in ("transformers", "tokenizers")
    )
    return user_cache("tokenizers") / f"{digest.hexdigest()[:32]}-{versions}.json"


def _encode_by_transformers(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer: {error}") from None
    remember(folder, tokenizer)
    return [int(token) for token in tokenizer(text)["input_ids"]]
