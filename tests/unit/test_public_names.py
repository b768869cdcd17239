"""What plugins and engines may import is declared and documented, and ours import nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.api import PAGE, PUBLIC, page, public_names

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
TEMPLATE = "hicache_core/cli/templates/backend"
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
INSIDE = {
    "docs/kv-events.md": "plays the controller, which tells what it stores",
    "docs/lifecycle.md": "opens a store without a cache, to show what it keeps",
    "docs/metrics.md": "makes up a snapshot, to show the series of a cache that is not there",
}
"""Pages whose examples use internal modules, and why."""


def imports(code: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import of ours; a module as a whole has no name."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((one.name, "") for one in node.names if one.name.startswith("hicache_core"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hicache_core"):
            yield from ((str(node.module), one.name) for one in node.names)


def undeclared(code: str) -> list[str]:
    """The imports of names that ``tools/api.py`` does not declare."""
    return [
        f"{module} {name}".strip()
        for module, name in imports(code)
        if module not in PUBLIC or name not in public_names(importlib.import_module(module))
    ]


def test_the_reference_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make api`"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there_and_tells_what_it_is(module: str) -> None:
    found = importlib.import_module(module)
    assert found.__doc__
    names = public_names(found)
    assert names
    for name in names:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{module}.{name}"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_our_plugins_import_declared_names_only(plugin: str) -> None:
    files = sorted((ROOT / "plugins" / plugin / "src").rglob("*.py"))
    assert any(list(imports(file.read_text())) for file in files)
    assert {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := undeclared(file.read_text()))
    } == {}


def test_so_does_the_plugin_that_hicache_new_backend_writes() -> None:
    for file in sorted((ROOT / TEMPLATE).rglob("*.template")):
        text = file.read_text()
        lines = re.findall(r"^from hicache_core[\w.]* import (?:\([^)]*\)|[^(\n]*)", text, re.M)
        assert undeclared("\n".join(lines)) == [], file


@pytest.mark.parametrize("name", PAGES)
def test_examples_of_the_documents_use_declared_names(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))
    lines = re.findall(
        r"^(?:>>> )?(from hicache_core[\w.]* import (?:\([^)]*\)|[^(\n]*))", code, re.M
    )
    found = undeclared("\n".join(lines))
    assert bool(found) == (name in INSIDE), found
