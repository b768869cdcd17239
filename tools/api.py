"""Writes ``docs/api.md``, the reference of the public names, from docstrings: ``make api``."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"

PUBLIC = {
    "hicache_core": "For everybody: the cache, its settings, what is cached.",
    "hicache_core.errors": "For everybody: every exception that HiCache raises.",
    "hicache_core.types": "For everybody: data that travels.",
    "hicache_core.kv.keys": "For everybody: the names of stored pages.",
    "hicache_core.plugin": "For plugins: what the module of an entry point needs.",
    "hicache_core.storage.base": "For plugins: the contract of a storage backend.",
    "hicache_core.plugin.backends": "For plugins: parts of a storage backend.",
    "hicache_core.plugin.transfers": "For plugins: transfer backends, contract and parts.",
    "hicache_core.testing.recipe": "For plugins: what the conformance kit is told of a backend.",
    "hicache_core.testing.suite": "For plugins: the conformance kit as a class of tests.",
    "hicache_core.integrations.transformers": "For engines: models of transformers.",
    "hicache_core.engine.engine": "For engines: the reference engine.",
    "hicache_core.engine.model": "For engines: loading a model.",
    "hicache_core.engine.packaged": "For engines: models whose weights a package brings.",
    "hicache_core.engine.request": "For engines: what the reference engine is asked, and answers.",
    "hicache_core.ranks.base": "For engines: several processes that hold one model.",
    "hicache_core.ranks.gloo": "For engines: ranks over torch.distributed.",
    "hicache_core.observe.events": "For engines: KV events for routers.",
    "hicache_core.observe.http": "For engines: a status server.",
    "hicache_core.observe.metrics": "For engines: the metrics of a cache.",
}
"""The modules that others may import from, and for whom each is."""

HEAD = """# API reference

These are the names that plugins and engines may import. Before one of them goes, it is deprecated
for a version. All other modules are internal. `make api` writes this page from the docstrings.

| module | what |
|---|---|
"""


class _Plain(str):
    """An annotation that a signature shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def public_names(module: ModuleType) -> list[str]:
    """The names that a module declares; without ``__all__``, those that it defines itself."""
    declared = getattr(module, "__all__", None)
    if declared is not None:
        return sorted(declared)
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [one.id for one in targets if isinstance(one, ast.Name)]
    hidden = (logging.Logger, TypeVar)
    return sorted(
        name
        for name in names
        if not name.startswith("_") and not isinstance(getattr(module, name), hidden)
    )


def signature(call: Callable[..., Any]) -> str:
    """The arguments of a call, as they are written."""
    try:
        found = inspect.signature(call)
    except (TypeError, ValueError):
        return ""
    shown = [
        one.replace(
            annotation=_plain(one.annotation),
            default=_Plain("...") if _has_no_text(one.default) else one.default,
        )
        for one in found.parameters.values()
    ]
    returns = _plain(found.return_annotation)
    return str(found.replace(parameters=shown, return_annotation=returns))


def _plain(annotation: object) -> object:
    return _Plain(annotation) if isinstance(annotation, str) else annotation


def _has_no_text(default: object) -> bool:
    return default is not inspect.Parameter.empty and repr(default).startswith("<")


def described(doc: str | None) -> Iterator[str]:
    """A docstring: its first paragraph as text, the rest as it is written."""
    first, _, rest = inspect.cleandoc(doc or "").partition("\n\n")
    if first:
        first = first.replace("``", "`").removesuffix("::")
        yield first + ("" if first.endswith((".", ":")) else ":" if rest else ".") + "\n"
    if rest:
        yield f"```text\n{rest}\n```\n"


def members(kind: type[Any]) -> Iterator[str]:
    """The public methods and properties of a class, those of internal bases included."""
    own = [one for one in reversed(kind.__mro__) if one.__module__.startswith("hicache_core")]
    for name in {name: None for one in own for name in vars(one)}:
        value = inspect.getattr_static(kind, name)
        plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if name.startswith(("_", "test_", "model_", "pytest_")):
            continue
        if isinstance(plain, property):
            yield f"**`{name}`**\n"
            yield from described(plain.__doc__)
        elif inspect.isfunction(plain):
            yield f"**`{name}{signature(plain)}`**\n"
            yield from described(inspect.getdoc(getattr(kind, name)))


def assigned(name: str, module: ModuleType) -> tuple[str, str] | None:
    """A value's assignment and the text below it, where they are; None for other names."""
    body = ast.parse(inspect.getsource(module)).body
    for node, below in pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.ImportFrom) and any(one.name == name for one in node.names):
            return assigned(name, importlib.import_module(str(node.module)))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(one, ast.Name) and one.id == name for one in targets):
            value = below.value if isinstance(below, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else ""
            return ast.unparse(node), str(text)
    return None


def entry(name: str, value: object, module: ModuleType) -> Iterator[str]:
    """One name: what it is, its arguments, its docstring."""
    if found := assigned(name, module):
        yield f"### `{name}`\n"
        yield f"```text\n{found[0]}\n```\n"
        yield from described(found[1])
    elif inspect.isclass(value):
        yield f"### class `{name}`\n"
        is_made = not issubclass(value, BaseModel | Exception | Enum)
        if is_made:
            yield f"```text\n{name}{signature(value)}\n```\n"
        yield from described(value.__doc__ if "__doc__" in vars(value) else None)
        start = inspect.getattr_static(value, "__init__")
        if is_made and inspect.isfunction(start) and start.__doc__:
            yield "**`__init__`**\n"
            yield from described(start.__doc__)
        if not issubclass(value, Exception):
            yield from members(value)
    else:
        yield f"### `{name}`\n"
        if callable(value):
            yield f"```text\n{name}{signature(value)}\n```\n"
            yield from described(value.__doc__)


def page() -> str:
    """The whole page."""
    parts = [HEAD + "".join(f"| `{name}` | {what} |\n" for name, what in PUBLIC.items())]
    seen: dict[int, str] = {}
    for path, what in PUBLIC.items():
        module = importlib.import_module(path)
        parts.append(f"## `{path}`\n\n{what}\n")
        for name in public_names(module):
            value = getattr(module, name)
            shared = not isinstance(value, int | str) and id(value) in seen
            if shared:
                parts.append(f"### `{name}`\n\nThe same as in `{seen[id(value)]}`.\n")
                continue
            seen[id(value)] = path
            parts.append("\n".join(entry(name, value, module)))
    text = "\n".join(parts)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
