"""The model that a command line names."""

from __future__ import annotations

from pathlib import Path

import torch

from hicache_core.engine.model import LoadedModel, load_folder, load_gguf
from hicache_core.engine.packaged import PACKAGED
from hicache_core.errors import ConfigError


def load_model(path: str, device: str) -> LoadedModel:
    """The model that ``--model-path`` means.

    Raises:
        ConfigError: there is none.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if path.lower() in PACKAGED:
        loaded = PACKAGED[path.lower()](dtype)
    elif path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ConfigError(f"--model-path {path}: there is no such file")
        loaded = load_gguf(Path(path), dtype)
    elif Path(path).is_dir():
        loaded = load_folder(Path(path), dtype)
    else:
        raise ConfigError(
            f"--model-path {path}: no folder and no GGUF file; write a local path, or "
            + " or ".join(PACKAGED)
        )
    loaded.model.to(device)
    return loaded
