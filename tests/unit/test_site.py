"""The docs as a site: every page is in it, and a reader needs no network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools.cli_reference import PAGE, page
from tools.site import ELSEWHERE, linked

ROOT = Path(__file__).resolve().parents[2]


class _Plain(yaml.SafeLoader):
    """Reads a configuration of mkdocs; the names of Python objects are left out."""


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_the_navigation_has_every_page() -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Plain)["nav"]
    named = set(re.findall(r"[\w/-]+\.md", json.dumps(nav)))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert named == pages | (set(ELSEWHERE.values()) - {"index.md"})


def test_the_reference_of_the_commands_is_what_their_help_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make api`"


@pytest.mark.parametrize(
    ("link", "url", "expected"),
    [
        ("[a](server.md#flags)", "", "[a](server.md#flags)"),
        ("[a](../ARCHITECTURE.md)", "", "[a](architecture.md)"),
        ("[a](../plugins/s3/README.md#use)", "", "[a](plugins/s3.md#use)"),
        ("[a](../README.md)", "", "[a](index.md)"),
        ("[a](../Makefile)", "", "a"),
        (
            "[a](../Makefile)",
            "https://example.org/h",
            "[a](https://example.org/h/blob/main/Makefile)",
        ),
        ("[a](https://example.org)", "", "[a](https://example.org)"),
        ("[a](#here)", "", "[a](#here)"),
        ("![a](images/page.png)", "", "![a](images/page.png)"),
    ],
)
def test_a_link_leads_to_a_page_of_the_site_or_to_the_repository(
    link: str, url: str, expected: str
) -> None:
    assert linked(link, "docs/metrics.md", "metrics.md", url) == expected


def test_links_of_a_plugin_lead_to_the_docs() -> None:
    text = linked("[a](../../docs/server.md)", "plugins/s3/README.md", "plugins/s3.md", "")
    assert text == "[a](../server.md)"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 50
    loaded = {
        address
        for one in pages
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", one.read_text(encoding="utf-8"))
        for address in re.findall(r'(?:src|href)="(https?:[^"]*)"', tag)
    }
    assert loaded == set()
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert any("quarantine" in one["text"].lower() for one in index["docs"])
