"""The models that servers and demos run, made once a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.shared_folders import one_at_a_time, shared_folder

if TYPE_CHECKING:
    from hicache_core.engine.model import LoadedModel


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder; all workers share it, and no test writes into it."""
    from tests.unit.engine.tiny_chat_model import save_tiny_chat_model

    return shared_folder(tmp_path_factory, "tiny-chat-model", save_tiny_chat_model)


@pytest.fixture(scope="session")
def tiny_windowed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window as a folder; all workers share it, and no test writes into it."""
    from tests.unit.engine.tiny_chat_model import save_tiny_windowed_chat_model

    return shared_folder(
        tmp_path_factory, "tiny-windowed-chat-model", save_tiny_windowed_chat_model
    )


@pytest.fixture(scope="session")
def tiny_chat(tiny_folder: Path) -> LoadedModel:
    """The same model in this process, without any cache of ours; no test changes it."""
    import torch

    from hicache_core.engine.model import load_folder

    return load_folder(tiny_folder, torch.float32)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The real model; no test changes it.

    A first load converts its weights, and every later one, in any process, reads the result.
    """
    import torch

    from hicache_core.engine.model import find_smollm2, load_gguf

    with one_at_a_time(tmp_path_factory, "smollm2"), warnings.catch_warnings():
        warnings.simplefilter("default")  # transformers' GGUF reader uses what numpy deprecates
        return load_gguf(find_smollm2(), torch.float32)


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Gemma 3 270M, with windows of 512 tokens; no test changes it."""
    import torch

    from hicache_core.engine.packaged import find_gemma3_270m, load_gemma3_270m
    from hicache_core.errors import ConfigError

    try:
        find_gemma3_270m()
    except ConfigError as error:  # its licence is for the user to accept
        pytest.skip(str(error))
    with one_at_a_time(tmp_path_factory, "gemma3"), warnings.catch_warnings():
        warnings.simplefilter("default")  # as above
        return load_gemma3_270m(torch.float32)
