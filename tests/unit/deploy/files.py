"""The files of deploy/, read as the programs read them that they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "hicache"
MANIFESTS = DEPLOY / "kubernetes" / "hicache.yaml"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(DEPLOY.rglob("*"))
    if path.is_file()
}
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def compose() -> dict[str, Any]:
    """compose.yaml with the defaults of its variables; ``set`` for one that must be set."""

    def value(match: re.Match[str]) -> str:
        return match[3] if match[2] == "-" else "set"

    loaded: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(value, TEXTS["deploy/compose.yaml"]))
    return loaded


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of Kubernetes by kind and name."""
    return objects_in(MANIFESTS.read_text(encoding="utf-8"))


def objects_in(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of manifests by kind and name."""
    found = [one for one in yaml.safe_load_all(text) if one]
    assert len({(one["kind"], one["metadata"]["name"]) for one in found}) == len(found)
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def pod_of(workload: Mapping[str, Any]) -> dict[str, Any]:
    """The pod that a Deployment or StatefulSet makes."""
    pod: dict[str, Any] = workload["spec"]["template"]
    return pod


def container_of(workload: Mapping[str, Any]) -> dict[str, Any]:
    """The only container of its pod."""
    (container,) = pod_of(workload)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def unit() -> dict[str, dict[str, list[str]]]:
    """The unit of systemd: section, name, values."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in TEXTS["deploy/systemd/hicache.service"].splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            section.setdefault(name, []).append(value)
    return found


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile: name and arguments, on one line each."""
    text = re.sub(r"(?m)^#.*\n", "", TEXTS["deploy/Dockerfile"])
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines) if name
    ]


def flags_in(words: Sequence[str]) -> list[str]:
    """The flags among the words of a command."""
    return [word for word in words if word.startswith("--")]
