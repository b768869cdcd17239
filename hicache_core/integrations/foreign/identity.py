"""Which model an engine's pages come from."""

from __future__ import annotations

from pathlib import Path

from hicache_core.kv.fingerprint import fingerprint_of_files

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def model_identity(name_or_path: str) -> str:
    """Returns what names a model in a namespace.

    Args:
        name_or_path: what the engine was given.

    Returns:
        ``fingerprint_of_files`` of config and weights if it is a local folder that has both;
        otherwise ``name:`` and the text itself. Two models of one name then share their pages.
    """
    folder = Path(name_or_path).expanduser()
    config = folder / "config.json"
    weights = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    if folder.is_dir() and config.is_file() and weights:
        return fingerprint_of_files([config, *weights])
    return f"name:{name_or_path}"
