"""docs/configuration.md is held to the code: each setting, its default and what is allowed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from hicache_core.config.flags import default_text
from hicache_core.config.messages import allowed_values
from hicache_core.config.settings import ControllerKeys, HiCacheConfig
from hicache_core.config.sources import env_name, flag_name

PAGE = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
ROWS = [(model, key) for model in (HiCacheConfig, ControllerKeys) for key in model.model_fields]


def row(model: type[BaseModel], key: str) -> str:
    """The line of the table that the page must have for this setting."""
    info = model.model_fields[key]
    schema = model.model_json_schema()["properties"][key]
    kind = schema.get("type") or schema["anyOf"][0]["type"]
    default = default_text(info.default)
    cells = [f"`{key}`", kind, f"`{default}`", allowed_values(model, key), info.description or ""]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize(("model", "key"), ROWS)
def test_every_setting_has_its_line(model: type[BaseModel], key: str) -> None:
    assert row(model, key) in PAGE.splitlines()


def test_no_line_is_of_a_setting_that_is_gone() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert {line.split("`")[1] for line in lines} == {key for _, key in ROWS}


@pytest.mark.parametrize("key", ["page_size", "hicache_ratio"])
def test_the_examples_of_names_are_right(key: str) -> None:
    assert flag_name(key) in PAGE
    assert env_name(key) in PAGE


def test_the_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) >= 2
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HICACHE_")}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    for example in examples:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", example],
            env=clean | {"PYTHONPATH": path},
            check=True,
            timeout=60,
        )
