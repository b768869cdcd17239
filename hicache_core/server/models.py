"""The model that a command line names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from hicache_core.engine.model import LoadedModel, load_folder, load_gguf
from hicache_core.engine.packaged import PACKAGED
from hicache_core.errors import ConfigError
from hicache_core.server.settings import ServerSettings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "half": torch.float16,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float": torch.float32,
        "float32": torch.float32,
    }
)


def load_model(path: str, device: str, dtype: str = "auto", chat_template: str = "") -> LoadedModel:
    """The model that ``--model-path`` means.

    Args:
        path: a folder, a GGUF file, the name of packaged weights or of a model in a hub's cache.
        device: where torch puts it.
        dtype: of weights and KV, one of ``DTYPES``; ``auto`` is float32 on a CPU, else bfloat16.
        chat_template: file with a Jinja template; empty for the model's own.

    Raises:
        ConfigError: there is none.
    """
    kind = _dtype(dtype, device)
    if path.lower() in PACKAGED:
        loaded = PACKAGED[path.lower()](kind)
    elif path.endswith(".gguf"):
        loaded = load_gguf(_file(path), kind)
    else:
        loaded = load_folder(_folder(path), kind)
    if chat_template:
        loaded.tokenizer.chat_template = _template(chat_template)
    loaded.model.to(device)
    return loaded


def check_model_path(settings: ServerSettings) -> None:
    """Checks what can be known of the model before it is loaded.

    Raises:
        ConfigError: there is no such model, or no such chat template.
    """
    path = settings.model_path
    if path.lower() not in PACKAGED:
        _file(path) if path.endswith(".gguf") else _folder(path)
    if settings.chat_template:
        _template(settings.chat_template)


def served_name(settings: ServerSettings, loaded: LoadedModel) -> str:
    """What clients call the model: as they were told, or the path by which they can find it."""
    path = settings.model_path
    is_named = path.lower() in PACKAGED or path.endswith(".gguf")
    return settings.served_model_name or (loaded.name if is_named else path)


def tokenizer_path(settings: ServerSettings, loaded: LoadedModel) -> str:
    """From where clients can load the tokenizer: the name on a hub, or a folder of this machine."""
    path = settings.model_path
    if _is_hub_id(path) or loaded.folder is None:
        return path
    return str(loaded.folder.resolve())


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return _DTYPES[name]


def _template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template {file}: {error}; write the path of a file with a Jinja template"
        ) from error


def _file(path: str) -> Path:
    if not Path(path).is_file():
        raise ConfigError(f"--model-path {path}: there is no such file")
    return Path(path)


def _is_hub_id(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _folder(path: str) -> Path:
    """A folder of this machine: as named, or where a hub's cache keeps the model."""
    if Path(path).is_dir():
        return Path(path)
    if not _is_hub_id(path):
        raise ConfigError(
            f"--model-path {path}: no folder and no GGUF file; write a local path, the name of a "
            f"model in the cache of Hugging Face's hub, or {' or '.join(PACKAGED)}"
        )
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"--model-path {path}: no such folder, and the cache of Hugging Face's hub has no "
            f"model of that name; nothing is downloaded: run `hf download {path}` before"
        ) from None
