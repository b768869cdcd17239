"""The model that the engines run, and what they answer without any cache."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny Llama; an engine takes it for the model's name."""
    from tests.engines.models import tiny_llama  # imports a model library, for seconds

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
