"""Compares the adapters with what was recorded of the engines' wheels, by their syntax alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from tools.engine_signatures import GIVEN, Uses, parameters

Record = dict[str, Any]


def drifts(dist: str, engine: str, used: Uses, record: Record) -> Iterator[str]:
    """Yields a sentence for everything in which adapter and engine do not fit.

    Args:
        dist: name and version of the wheel.
        engine: ``sglang``, ``vllm`` or ``lmcache``.
        used: what the adapter uses.
        record: what was recorded of the wheel.
    """
    for name, is_needed in used.names.items():
        if name not in record:
            yield (
                f"the record of {dist} does not have {name}; "
                "write it again with tools/engine_signatures.py"
            )
        elif is_needed and record[name]["kind"] == "missing":
            yield f"{dist} has no {name}, which the adapter needs"
    for file, module in used.modules.items():
        known = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(module)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" in record
        }
        here = {name: (full, record[full]) for name, full in known.items()}
        given = {
            key.partition(":")[2]: (full, record[full])
            for key, full in GIVEN[engine].items()
            if key.startswith(f"{file}:") and full in record
        }
        yield from _misused(dist, module, here, given)
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                yield from _class_drifts(dist, node, here)
                if (full := GIVEN[engine].get(node.name)) in record and _is_protocol(node):
                    yield from _protocol_drifts(dist, node, full, record[full])


def _is_protocol(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def _methods(node: ast.ClassDef) -> dict[str, str | None]:
    """The parameters of each method of ours; None for a property or another name."""
    found: dict[str, str | None] = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            is_property = any(ast.unparse(mark) == "property" for mark in item.decorator_list)
            found[item.name] = None if is_property else parameters(item.args)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = None
        elif isinstance(item, ast.Assign):
            found |= {target.id: None for target in item.targets if isinstance(target, ast.Name)}
    return found


def _class_drifts(
    dist: str, node: ast.ClassDef, here: dict[str, tuple[str, Record]]
) -> Iterator[str]:
    """What does not fit in a class that is derived from an engine's."""
    bases = [here[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in here]
    ours = _methods(node)
    for full, base in bases:
        for name, member in base.get("members", {}).items():
            theirs = member.get("parameters")
            if name not in ours:
                if member.get("abstract"):
                    yield f"{dist}: {full}.{name} is abstract, and {node.name} does not define it"
                continue
            mine = ours[name]
            if name == "__init__" or theirs is None or mine is None:
                continue
            if not takes(mine, theirs):
                yield (
                    f"{dist} calls {full}.{name}({theirs}), "
                    f"which {node.name}.{name}({mine}) does not take"
                )


def _protocol_drifts(dist: str, node: ast.ClassDef, full: str, given: Record) -> Iterator[str]:
    """What does not fit in a protocol of ours for something that the engine hands us."""
    members = given.get("members", {})
    for name, ours in _methods(node).items():
        if name not in members:
            yield f"{dist} has no {full}.{name}, which {node.name} names"
        elif ours is not None and not takes(members[name].get("parameters", "self"), ours):
            yield (
                f"{dist} has {full}.{name}({members[name].get('parameters')}), "
                f"which cannot be called as {node.name}.{name}({ours})"
            )


def _misused(
    dist: str,
    module: ast.Module,
    here: dict[str, tuple[str, Record]],
    given: dict[str, tuple[str, Record]],
) -> Iterator[str]:
    """Calls that an engine's function or class does not take, and members it does not have.

    Args:
        dist: name and version of the wheel.
        module: of the adapter.
        here: what it imports from the engine, by the name it has there.
        given: what its variables hold.
    """
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in here:
            full, said = here[node.func.id]
            made = said.get("members", {}).get("__init__", said)
            if "parameters" in made and not fits(node, made["parameters"], said["kind"]):
                yield f"{dist} has {full}({made['parameters']}), not called as {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            full, said = (here | given).get(node.value.id, ("", {}))
            if said.get("kind") == "class" and node.attr not in said["members"]:
                yield f"{dist} has no {full}.{node.attr}"


def takes(callee: str, call: str) -> bool:
    """Whether a function with the parameters ``callee`` takes each call that ``call`` allows."""
    ours, theirs = _arguments(callee), _arguments(call)
    our_names, their_names = _positional(ours), _positional(theirs)
    names = [name for name, _ in our_names]
    if [name for name, _ in their_names] != names[: len(their_names)]:
        return bool(ours.vararg and ours.kwarg)
    optional = dict(our_names)
    if any(has_default and not optional[name] for name, has_default in their_names):
        return False
    by_name = {kw.arg for kw in ours.kwonlyargs} | set(names)
    if not ours.kwarg and any(kw.arg not in by_name for kw in theirs.kwonlyargs):
        return False
    given = {name for name, _ in their_names} | {kw.arg for kw in theirs.kwonlyargs}
    needed = {name for name, has_default in our_names if not has_default} | {
        kw.arg
        for kw, default in zip(ours.kwonlyargs, ours.kw_defaults, strict=True)
        if default is None
    }
    if needed - given:
        return False
    return not (theirs.vararg and not ours.vararg) and not (theirs.kwarg and not ours.kwarg)


def fits(call: ast.Call, text: str, kind: str) -> bool:
    """Whether a call has the right number of positional arguments and only known names."""
    arguments = _arguments(text)
    positional = _positional(arguments)[1 if kind == "class" else 0 :]
    by_name = {name for name, _ in positional} | {kw.arg for kw in arguments.kwonlyargs}
    if any(isinstance(value, ast.Starred) for value in call.args):
        return True
    if len(call.args) > len(positional) and not arguments.vararg:
        return False
    named = {keyword.arg for keyword in call.keywords}
    if named - by_name - {None} and not arguments.kwarg:
        return False
    missing = {name for name, optional in positional[len(call.args) :] if not optional} - named
    return not missing or None in named


def _arguments(text: str) -> ast.arguments:
    function = ast.parse(f"def f({text}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def _positional(arguments: ast.arguments) -> list[tuple[str, bool]]:
    """Names of positional parameters, and whether each has a default."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    n_needed = len(names) - len(arguments.defaults)
    return [(name, n >= n_needed) for n, name in enumerate(names)]
