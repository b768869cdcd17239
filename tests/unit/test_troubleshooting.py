"""docs/troubleshooting.md is held to the code: each class of error, and messages that exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hicache_core import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
KINDS = [
    name
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.HiCacheError)
    and name not in ("HiCacheError", "PluginError", "BackendError")
]
MESSAGES = re.findall(r"(?m)^\| `([^`]+)` \| [A-Z]", PAGE)


def texts() -> Iterator[str]:
    """Every text of the product's code; what an f-string fills in is an ellipsis."""
    sources = [*ROOT.glob("hicache_core/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                yield "".join(part if isinstance(part, str) else "…" for part in parts)


def test_every_class_of_error_has_a_section() -> None:
    sections = re.findall(r"(?m)^### `(\w+)`$", PAGE)
    assert sorted(sections) == sorted(KINDS)


def test_every_message_is_one_that_the_code_has() -> None:
    assert len(MESSAGES) > 40
    known = list(texts())
    gone = [one for one in MESSAGES if not any(_fits(one, text) for text in known)]
    assert gone == []


def _fits(message: str, text: str) -> bool:
    """Whether the parts of a message stand in a text in this order."""
    at = 0
    for part in message.split("…"):
        at = text.find(part.strip(), at)
        if at < 0:
            return False
    return True


@pytest.mark.parametrize(("message", "fits"), [("a … c", True), ("c … a", False), ("d", False)])
def test_a_message_fits_a_text_with_all_its_parts_in_order(message: str, fits: bool) -> None:
    assert _fits(message, "a b c") is fits
