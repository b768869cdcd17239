"""The tutorial runs from its first block to its last, and the docs name every rule."""

from __future__ import annotations

import re
from pathlib import Path

from hicache_core.testing.rules import RULES
from tests.conformance.installed import ROOT, run

_BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_tutorial_goes_from_an_empty_folder_to_a_backend_that_conforms(tmp_path: Path) -> None:
    folder, target = tmp_path / "hicache-sqlite", tmp_path / "site"
    folder.mkdir()
    told = ""
    for language, file, text in _BLOCK.findall((ROOT / "docs/write-a-backend.md").read_text()):
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        elif language == "sh":
            for line in text.splitlines():
                told += run(line, cwd=folder, target=target)
    assert re.search(r"^sqlite +storage +hicache-sqlite +0\.1\.0 +ok$", told, re.MULTILINE), told
    assert "backend 'sqlite' conforms" in told
    assert told.count("conforms") == 2


def test_every_rule_is_in_the_docs() -> None:
    text = (ROOT / "docs/conformance.md").read_text()
    for rule in RULES:
        assert f"| `{rule.id}` | {rule.level} | {rule.text} |" in text
