"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import hicache_core
from hicache_core import errors
from hicache_core.cli.main import cli
from hicache_core.observe.catalogue import SERIES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "hicache_core").rglob("*.py")) + sorted(ROOT.glob("plugins/*/src/**/*.py"))


def test_every_error_stands_in_the_tree_of_errors_py() -> None:
    """The docstring of ``errors`` draws each class, below its parent and with its builtin."""
    drawn = dict(re.findall(r"^[ │├└─]*(\w+)(?: \((\w+)\))?", errors.__doc__ or "", re.MULTILINE))
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert len(classes) > 10
    for name, kind in classes.items():
        assert name in drawn, f"{name} is not drawn"
        builtins = [base.__name__ for base in kind.__bases__ if base.__module__ == "builtins"]
        if name != "HiCacheError":
            assert drawn[name] == "".join(builtins), name


def test_no_source_file_grows_beyond_its_limit() -> None:
    assert len(SOURCES) > 30
    long = {
        str(path.relative_to(ROOT)): n
        for path in SOURCES
        if (n := len(path.read_text().splitlines())) > 700  # no class is cut in two for it
    }
    assert long == {}


def test_no_function_grows_beyond_its_limit() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    }
    assert long == {}


def _nameless_arguments(file: Path) -> Iterator[str]:
    """The arguments of public functions with three or more that their docstrings do not name."""
    source = file.read_text()
    parts: list[ast.Module | ast.ClassDef] = [ast.parse(source)]
    while parts:
        for node in parts.pop().body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                parts.append(node)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [one.arg for one in given if one.arg not in ("self", "cls")]
            marks = {ast.unparse(one).split("(")[0].split(".")[-1] for one in node.decorator_list}
            if (
                len(names) < 3
                or (node.name.startswith("_") and node.name != "__init__")
                or marks & {"command", "group", "overload"}  # options of click have help
                or "# docstring inherited" in (ast.get_source_segment(source, node) or "")
            ):
                continue
            says = ast.get_docstring(node) or ""
            for name in names:
                if not re.search(rf"(?m)``{name}``|^ +(\w+, )*{name}(, \w+)*: ", says):
                    yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {name}"


def test_public_functions_name_their_arguments() -> None:
    nameless = [found for path in SOURCES for found in _nameless_arguments(path)]
    assert nameless == []


def test_layers_are_packages_and_the_contracts_have_hardly_an_exception() -> None:
    """What the contracts say is checked by import-linter, that they stay strict is checked here."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = {contract["type"]: contract for contract in settings["contracts"]}
    rows = [re.split(r" [|:] ", row) for row in contracts["layers"]["layers"]]
    assert len(rows) <= 12
    named = {name for row in rows for name in row}
    packages = {
        f"hicache_core.{path.parent.name}" for path in (ROOT / "hicache_core").glob("*/__init__.py")
    }
    assert named == packages
    assert contracts["acyclic_siblings"]["ancestors"] == ["hicache_core", "hicache_core.**"]
    assert all(len(contract.get("ignore_imports", [])) <= 5 for contract in contracts.values())


def test_every_module_says_what_it_is() -> None:
    for path in SOURCES:
        assert path.read_text().startswith('"""'), path


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_links_between_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("plugins/*/*.md")]
    broken = [
        f"{page.relative_to(ROOT)} -> {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_each_decision_has_a_number_of_its_own() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    numbers = [page.name[:4] for page in pages]
    assert numbers == [f"{n:04}" for n in range(1, len(pages) + 1)]
    assert [page.read_text()[2:6] for page in pages] == numbers


@pytest.mark.parametrize(
    "module",
    [
        "hicache_core",
        "hicache_core.storage.base",
        "hicache_core.storage.file.backend",
        "hicache_core.radix.tree",
        "hicache_core.plugin.manager",
        "hicache_core.plugin.dynamic",
        "hicache_core.cli.main",
        "hicache_core.config.settings",
    ],
)
def test_what_authors_of_backends_import_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", hicache_core.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(hicache_core, name).__doc__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Hicache"):
        getattr(hicache_core, "Hicache")  # noqa: B009 - the name is wrong on purpose


RIDDLES = re.compile(
    r"\bunder way\b"  # it runs, is queued or in flight
    r"|\bfigures?\b"  # numbers, values, times
    r"|\bstands? (?:in|at|before|beside|behind|below|under|there|for)\b"  # is
    r"|(?<![Tt]here )\bis no (?!longer\b|more\b|less\b|faster\b|slower\b)\w+"  # is not a
)


def _help_of(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    yield path, command.help or ""
    for option in command.params:
        yield f"{path} {option.name}", getattr(option, "help", None) or ""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _help_of(child, f"{path} {name}")


def test_pages_and_help_are_free_of_turns_of_phrase_that_read_as_translated() -> None:
    """The command line, settings (its flags), metrics and pages say it in the usual words."""
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in pages}
    texts |= {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
    texts |= dict(_help_of(cli, "hicache"))
    texts |= {series.name: series.meaning for group in SERIES.values() for series in group}
    assert len(texts) > 200
    found = [
        f"{where}: {match[0]}" for where, text in texts.items() for match in RIDDLES.finditer(text)
    ]
    assert found == []


NAME_OF_ARGUMENT = re.compile(r"(?m)^ +\w+: ")


def _sentences(file: Path) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, and the texts that it raises or logs."""
    for node in ast.walk(ast.parse(file.read_text())):
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield where, NAME_OF_ARGUMENT.sub("", ast.get_docstring(node) or "")
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _logs(node)):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield where, part.value


def _logs(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "log"


def test_docstrings_and_messages_are_free_of_them_too() -> None:
    files = [*ROOT.glob("hicache_core/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    found = [
        f"{where}: {match[0]}"
        for file in files
        for where, text in _sentences(file)
        for match in RIDDLES.finditer(text)
    ]
    assert found == []
