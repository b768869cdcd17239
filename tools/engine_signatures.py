"""Records what the adapters use of an engine, from its wheel, without importing it.

python -m tools.engine_signatures WHEEL…   writes tests/engines/signatures/NAME-VERSION.json

`pip download --no-deps vllm==0.33.0` fetches a wheel. What an adapter uses is what it imports from
the engine, what it derives classes from, what it is given (``GIVEN``), and functions that it names
as text for the engine's hooks. ``tests/engines/signatures`` compares the records with the adapters.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "hicache_core/integrations"
RECORDS = ROOT / "tests/engines/signatures"

GIVEN = {
    "sglang": {
        "StorageConfig": "sglang.srt.mem_cache.hicache_storage.HiCacheStorageConfig",
        "PoolTransfer": "sglang.srt.mem_cache.hicache_storage.PoolTransfer",
        "HostPool": "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost",
        "flags.py:_add_flags": "sglang.srt.server_args.ServerArgs.add_cli_args",
        "flags.py:_translate": "sglang.srt.server_args.ServerArgs.from_cli_args",
    },
    "vllm": {
        "tier.py:offloading_spec": "vllm.v1.kv_offload.tiering.spec.TieringOffloadingSpec",
        "keys.py:config": "vllm.v1.kv_offload.config.OffloadingConfig",
        "keys.py:cache": "vllm.v1.kv_offload.config.OffloadingCacheConfig",
        "keys.py:parallel": "vllm.v1.kv_offload.config.OffloadingParallelConfig",
    },
    "lmcache": {},
}
"""What an engine hands to an adapter, or calls with it: by the protocol that says so, or by file
and variable."""

Root = Path | zipfile.Path


@dataclass
class Uses:
    """What the adapter of an engine uses of it.

    Attributes:
        names: dotted names; True if the adapter cannot be imported without.
        modules: the adapter's code, by file name.
    """

    names: dict[str, bool] = field(default_factory=dict)
    modules: dict[str, ast.Module] = field(default_factory=dict)


def uses(engine: str) -> Uses:
    """What the adapter of ``sglang``, ``vllm`` or ``lmcache`` uses."""
    found = Uses()
    for file in sorted((ADAPTERS / engine).glob("*.py")):
        tree = found.modules[file.name] = ast.parse(file.read_text())
        for node in ast.walk(tree):
            for name in _named(node, engine):
                found.names.setdefault(name, False)
        for statement in tree.body:  # what stands deeper is imported when it is there, or never
            for name in _imported(statement, engine):
                found.names[name] = True
    for name in GIVEN[engine].values():
        found.names.setdefault(name, True)
    return found


def _imported(node: ast.AST, engine: str) -> Iterator[str]:
    module = node.module or "" if isinstance(node, ast.ImportFrom) and not node.level else ""
    if module.partition(".")[0] == engine and isinstance(node, ast.ImportFrom):
        yield from (f"{module}.{alias.name}" for alias in node.names)


def _named(node: ast.AST, engine: str) -> Iterator[str]:
    yield from _imported(node, engine)
    text = node.value if isinstance(node, ast.Constant) else None
    if isinstance(text, str) and re.fullmatch(rf"{engine}(\.\w+){{2,}}", text):
        yield text


def record(root: Root, engine: str) -> dict[str, Any]:
    """What an unpacked or packed wheel says of everything that the adapter uses.

    Args:
        root: the wheel, or the folder it is installed in.
        engine: ``sglang``, ``vllm`` or ``lmcache``.

    Returns:
        For each dotted name its kind; for functions the parameters; for classes the members.
    """
    reader = _Reader(root)
    return {name: reader.described(name) for name in sorted(uses(engine).names)}


class _Reader:
    """Reads modules of one wheel."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._trees: dict[str, ast.Module | None] = {}

    def described(self, name: str) -> dict[str, Any]:
        """The record of a dotted name."""
        module, _, last = name.rpartition(".")
        if (tree := self._tree(module)) is None:
            owner: dict[str, Any] = self.described(module) if "." in module else {}
            member = owner.get("members", {}).get(last)
            if member is not None:
                return {"kind": "function", **member}
            return {"kind": "compiled" if self._is_compiled(module) else "missing"}
        found = self._find(tree, module, last)
        if found is None:
            return {"kind": "missing"}
        node, where = found
        if isinstance(node, ast.ClassDef):
            members = self._members(node, where)
            public = {
                name: member
                for name, member in members.items()
                if name == "__init__" or not name.startswith("_")
            }
            return {"kind": "class", "members": public}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return {"kind": "function", "parameters": parameters(node.args)}
        return {"kind": "value"}

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            base = module.replace(".", "/")
            files = [self._root / f"{base}.py", self._root / f"{base}/__init__.py"]
            source = next((file.read_text("utf-8") for file in files if file.is_file()), None)
            self._trees[module] = None if source is None else ast.parse(source)
        return self._trees[module]

    def _is_compiled(self, module: str) -> bool:
        folder, _, name = module.rpartition(".")
        parent = self._root / folder.replace(".", "/")
        return parent.is_dir() and any(
            file.name.startswith(f"{name}.") and file.name.endswith(".so")
            for file in parent.iterdir()
        )

    def _find(self, tree: ast.Module, module: str, name: str) -> tuple[ast.AST, str] | None:
        """Where a name is defined: the statement, and the module it stands in."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._follow(node, module, alias.name)
        for node in tree.body:
            if getattr(node, "name", None) == name:
                return node, module
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node, module
        return None

    def _follow(self, node: ast.ImportFrom, module: str, name: str) -> tuple[ast.AST, str] | None:
        source = node.module or ""
        if node.level:
            is_package = (self._root / module.replace(".", "/") / "__init__.py").is_file()
            parts = module.split(".")
            kept = parts[: len(parts) - node.level + is_package]
            source = ".".join([*kept, source] if source else kept)
        tree = self._tree(source)
        return None if tree is None else self._find(tree, source, name)

    def _members(self, node: ast.ClassDef, module: str) -> dict[str, dict[str, Any]]:
        """Members of a class and of its bases in this wheel; a dataclass has its ``__init__``."""
        members: dict[str, dict[str, Any]] = {}
        for base in reversed(node.bases):
            tree = self._tree(module)
            if isinstance(base, ast.Name) and tree is not None:
                found = self._find(tree, module, base.id)
                if found is not None and isinstance(found[0], ast.ClassDef):
                    members.update(self._members(found[0], found[1]))
        own: dict[str, dict[str, Any]] = {}
        for item in node.body:
            own |= {name: said for name, said in _member(item).items() if said or name not in own}
        members |= own
        if _is_record(node):
            inherited = members.get("__init__", {}).get("parameters", "self")
            members["__init__"] = {"parameters": ", ".join([inherited, *_fields(node)])}
        return members


def _member(item: ast.stmt) -> dict[str, dict[str, Any]]:
    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
        marks = {ast.unparse(mark).rpartition(".")[2] for mark in item.decorator_list}
        if "property" in marks:
            return {item.name: {"abstract": True} if "abstractmethod" in marks else {}}
        member: dict[str, Any] = {"parameters": parameters(item.args)}
        member |= {"abstract": True} if "abstractmethod" in marks else {}
        return {**_attributes(item), item.name: member}
    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
        return {item.target.id: {}}
    if isinstance(item, ast.Assign):
        return {target.id: {} for target in item.targets if isinstance(target, ast.Name)}
    return {}


def _attributes(method: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, dict[str, Any]]:
    """What a method sets on ``self``."""
    return {
        node.attr: {}
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _is_record(node: ast.ClassDef) -> bool:
    marks = [*node.decorator_list, *node.bases]
    return any(re.search(r"\b(dataclass|NamedTuple)\b", ast.unparse(mark)) for mark in marks)


def _fields(node: ast.ClassDef) -> list[str]:
    """What a dataclass or NamedTuple adds to the parameters that it is made with."""
    return [
        item.target.id + ("=..." if item.value is not None else "")
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and "ClassVar" not in ast.unparse(item.annotation)
    ]


def parameters(arguments: ast.arguments) -> str:
    """Names, kinds and defaults of parameters, without annotations: ``self, key, value=None``."""
    bare = ast.parse(f"def f({ast.unparse(arguments)}): ...").body[0]
    assert isinstance(bare, ast.FunctionDef)
    for node in ast.walk(bare.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(bare.args)


def main(wheels: list[str]) -> None:
    """Writes one record for each wheel."""
    for wheel in wheels:
        name, version, *_ = Path(wheel).name.split("-")
        with zipfile.ZipFile(wheel) as packed:
            said = record(zipfile.Path(packed), name.partition("_")[0])
        file = RECORDS / f"{name.replace('_', '-')}-{version}.json"
        file.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
