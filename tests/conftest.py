"""The tiny chat model that servers and demos run, made once a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.shared_folders import shared_folder

if TYPE_CHECKING:
    from hicache_core.engine.model import LoadedModel


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder; all workers share it, and no test writes into it."""
    from tests.unit.engine.tiny_chat_model import save_tiny_chat_model

    return shared_folder(tmp_path_factory, "tiny-chat-model", save_tiny_chat_model)


@pytest.fixture(scope="session")
def tiny_chat(tiny_folder: Path) -> LoadedModel:
    """The same model in this process, without any cache of ours; no test changes it."""
    import torch

    from hicache_core.engine.model import load_folder

    return load_folder(tiny_folder, torch.float32)
