"""What the Python of a GPU machine lacks, and wheels that lie beside the checkout.

Imports the standard library only, since nothing else may be there.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXTRAS = ("torch", "engine")
NOT_NEEDED = {"hicache-core", "gguf", "accelerate", "sentencepiece"}
"""Of these extras: what only models from files need."""

GLIBC = (39, 36, 35, 34, 31, 28, 27, 24, 17, 12, 5)
"""Versions 2.n of glibc for which wheels are built; pip takes a platform by its exact name."""

Version = tuple[int, ...]


class WheelsMissing(Exception):
    """The machine lacks packages; the message says which, and how to bring them."""


def requirements() -> dict[str, str]:
    """What the checks import: names and versions, as ``pyproject.toml`` asks for them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    found = {}
    for line in lines:
        name, versions = re.fullmatch(r"([\w-]+)(?:\[.*\])?(.*)", line).groups()  # type: ignore[union-attr]
        if name not in NOT_NEEDED:
            found[name] = versions
    return {**found, "triton": ""}


def lacking(wanted: dict[str, str]) -> list[str]:
    """Those of ``wanted`` that this Python has not, or in another version than is asked for."""
    return [name for name, versions in wanted.items() if not _is_there(name, versions)]


def _is_there(name: str, versions: str) -> bool:
    try:
        found = _version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
    return all(_holds(found, condition) for condition in versions.split(",") if condition)


def _holds(found: Version, condition: str) -> bool:
    compared, wanted = re.fullmatch(r"(>=|<)(.+)", condition.strip()).groups()  # type: ignore[union-attr]
    return found >= _version(wanted) if compared == ">=" else found < _version(wanted)


def _version(text: str) -> Version:
    """The numbers of a version; a part such as ``+cu130`` or ``rc1`` does not count."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", text).group().split(".")))  # type: ignore[union-attr]


def is_cuda_build() -> bool:
    """Whether the installed torch was built for CUDA; nothing is imported."""
    try:
        files = importlib.metadata.files("torch") or ()
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(file.name == "libtorch_cuda.so" for file in files)


def what_to_bring() -> str:
    """A list of what this Python lacks, and the command that fetches it elsewhere."""
    missing = lacking(requirements())
    if "torch" not in missing and not is_cuda_build():
        missing.append("torch")
    if not missing:
        return "nothing: this Python has all that the checks import"
    version = ".".join(platform.python_version_tuple()[:2])
    pins = pinned(missing)
    lines = [f"this Python ({version}, {sysconfig.get_platform()}) lacks:", *pins]
    if "torch" in missing:
        lines.append("torch must be a build for CUDA, which brings CUDA's libraries: some 4 GB")
    return "\n".join(
        [
            *lines,
            "",
            "fetch them, with all that they need, on a machine of the same kind with a network:",
            f"  python -m benchmarks.gpu --bring gpu-wheels --python {version} {' '.join(missing)}",
            "and put the folder gpu-wheels into this checkout, or name it with --wheels",
        ]
    )


def pinned(names: Iterable[str]) -> list[str]:
    """``name==version`` as ``constraints.txt`` has them; a name alone where it has none."""
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    versions = {_normal(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    return [
        f"{name}=={versions[_normal(name)]}" if _normal(name) in versions else name
        for name in names
    ]


def bring(folder: Path, python: str, names: Sequence[str]) -> list[str]:
    """The command that downloads wheels, with what they need in turn, for a Python on Linux.

    Args:
        folder: where they go.
        python: its version, such as ``3.12``.
        names: what it lacks; all requirements if empty.
    """
    machine = platform.machine()
    platforms = [f"--platform=manylinux_2_{n}_{machine}" for n in GLIBC]
    platforms += [f"--platform={name}_{machine}" for name in ("manylinux2014", "linux")]
    return [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download"),
        *("--only-binary=:all:", "--implementation=cp", f"--python-version={python}"),
        *platforms,
        f"--constraint={REPOSITORY / 'constraints.txt'}",
        f"--dest={folder}",
        *pinned(names or requirements()),
    ]


def download(folder: Path, python: str, names: Sequence[str]) -> None:
    """Runs ``bring``.

    Args:
        folder: where wheels go; it is made.
        python: version of the Python that lacks them.
        names: what it lacks; all requirements if empty.

    Raises:
        WheelsMissing: pip could not fetch them; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(bring(folder, python, names), check=False).returncode:
        raise WheelsMissing(f"pip could not fetch all wheels for Python {python} into {folder}")


def supply(wheels: Path, into: Path) -> list[str]:
    """Unpacks the wheels that this Python lacks, and puts them behind what it has.

    Args:
        wheels: the folder that they lie in; it need not exist.
        into: a new folder for their content.

    Returns:
        Names of the wheels that were unpacked.

    Raises:
        WheelsMissing: requirements are still missing.
    """
    announce(into)
    sys.path.append(str(into))
    unpacked, wanted = [], requirements()
    for wheel in sorted(wheels.glob("*.whl")):
        name = wheel.name.partition("-")[0]
        if not _is_there(name, wanted.get(_normal(name), "")):
            unpack(wheel, into)
            unpacked.append(wheel.name)
    importlib.invalidate_caches()
    if lacking(wanted):
        raise WheelsMissing(f"no wheel in {wheels} has the rest: {what_to_bring()}")
    return unpacked


def announce(into: Path) -> None:
    """Makes the checkout an installed distribution for ``importlib.metadata``, unless it is one.

    Storage backends, ``file`` among them, are found by entry points.

    Args:
        into: a folder that is to be on ``sys.path``; it is made.
    """
    into.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    if _is_there(name, ""):
        return
    info = into / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


def unpack(wheel: Path, into: Path) -> None:
    """Extracts a wheel: its modules into ``into``; scripts and headers are left out.

    Args:
        wheel: the file.
        into: a folder that is to be on ``sys.path``.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            found = re.fullmatch(r"[^/]+\.data/(\w+)/(.+)", member.filename)
            if found is not None:
                kind, name = found.groups()
                if kind not in {"purelib", "platlib"}:
                    continue
                member.filename = name
            archive.extract(member, into)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
