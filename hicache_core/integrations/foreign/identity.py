"""Which model an engine's pages come from."""

from __future__ import annotations

from pathlib import Path

from hicache_core.kv.fingerprint import fingerprint_of_files

BY_NAME = "name:"
"""How the identity of a model begins whose weights were not looked at."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def model_identity(name_or_path: str) -> str:
    """Returns what names a model in a namespace.

    Args:
        name_or_path: what the engine was given.

    Returns:
        The digest of ``fingerprint_of_files``, if it is a local file, or a local folder with
        weights: of these and of ``config.json``. It does not depend on where they lie. Otherwise
        ``name:`` and the name, or the absolute path of a folder without weights: two models of
        that name then share their pages.

    Raises:
        OSError: a file cannot be read.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return fingerprint_of_files([path])
    if not path.is_dir():
        return BY_NAME + name_or_path
    # In a cache of Hugging Face the files of a snapshot are links; their own names count.
    weights = {file for pattern in _WEIGHTS for file in path.glob(pattern) if file.is_file()}
    if not weights:
        return BY_NAME + str(path.resolve())
    config = path / "config.json"
    return fingerprint_of_files([*weights, *([config] if config.is_file() else [])])
