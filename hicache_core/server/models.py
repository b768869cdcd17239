"""The model that a command line names."""

from __future__ import annotations

from pathlib import Path

import torch

from hicache_core.engine.model import LoadedModel, find_smollm2, load_folder, load_gguf
from hicache_core.errors import ConfigError

SMOLLM2 = "smollm2"


def load_model(path: str, device: str) -> LoadedModel:
    """The model that ``--model-path`` means.

    Raises:
        ConfigError: there is none.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if path.lower() == SMOLLM2:
        loaded = load_gguf(find_smollm2(), dtype)
    elif path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ConfigError(f"--model-path {path}: there is no such file")
        loaded = load_gguf(Path(path), dtype)
    elif Path(path).is_dir():
        loaded = load_folder(Path(path), dtype)
    else:
        raise ConfigError(
            f"--model-path {path}: no folder and no GGUF file; write a local path, or {SMOLLM2}"
        )
    loaded.model.to(device)
    return loaded
