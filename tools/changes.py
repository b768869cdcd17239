"""The changelogs, one file a change: checks the files, or moves them into the changelogs.

python tools/changes.py          check
python tools/changes.py 0.2.0    move all into the section of that version, at a release
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
WIDTH = 120


def fragments(project: Path) -> list[Path]:
    """The changes of a distribution since its last release, by file name."""
    return sorted(path for path in (project / "changes").glob("*") if path.name != "README.md")


def problems(fragment: Path) -> list[str]:
    """What is wrong with the file of a change."""
    text = fragment.read_text(encoding="utf-8")
    rules = {
        "its name is not lower-case-words.md": re.fullmatch(r"[a-z0-9-]+\.md", fragment.name),
        "it is not one paragraph that ends with a line break": re.fullmatch(r"(.+\n)+", text),
        "its text does not begin with a word, a number or code": re.match(r"[\w`]", text),
        "its last sentence has no full stop": text.endswith((".\n", ".`\n")),
        f"a line is longer than {WIDTH} characters": max(map(len, text.split("\n"))) <= WIDTH - 2,
    }
    return [
        f"{fragment.parent.name}/{fragment.name}: {rule}"
        for rule, kept in rules.items()
        if not kept
    ]


def release(project: Path, version: str) -> None:
    """Moves the changes of a distribution into its changelog, below the heading of the version."""
    found = fragments(project)
    if not found:
        return
    points = "".join(
        "- " + fragment.read_text(encoding="utf-8").strip().replace("\n", "\n  ") + "\n"
        for fragment in found
    )
    file = project / "CHANGELOG.md"
    title, *sections = re.split(r"(?m)^(?=## )", file.read_text(encoding="utf-8"))
    heading = f"## {version}\n"
    if sections and sections[0].startswith(heading):
        sections[0] = sections[0].rstrip() + "\n" + points
    else:
        sections.insert(0, f"{heading}\n{points}\n")
    file.write_text(title + "".join(sections), encoding="utf-8")
    for fragment in found:
        fragment.unlink()


def main() -> None:
    """Checks, or with a version releases."""
    found = [line for project in PROJECTS for one in fragments(project) for line in problems(one)]
    if found:
        sys.exit("\n".join(found))
    for version in sys.argv[1:]:
        for project in PROJECTS:
            release(project, version)


if __name__ == "__main__":
    main()
