"""Engines kill their children: what a store for engines answered is there without ``close``."""

from __future__ import annotations

from pathlib import Path

from tests.foreign_rules import (
    a_page_of_another_length_is_a_miss,
    killed_writers_leave_what_was_answered_and_no_wrong_page,
    namespaces_of_several_lengths_share_a_store,
)


def file(path: Path) -> dict[str, object]:
    return {"path": str(path)}


def test_a_killed_engine_loses_nothing_that_was_answered_on_file(tmp_path: Path) -> None:
    killed_writers_leave_what_was_answered_and_no_wrong_page("file", file(tmp_path))


def test_a_killed_engine_loses_nothing_that_a_chain_writing_behind_answered(
    tmp_path: Path,
) -> None:
    """The copies of the second store may be missing. The first one has all."""
    links = [
        {"backend": "file", "name": name, "config": file(tmp_path / name)}
        for name in ("near", "far")
    ]
    settings = {"links": links, "write": "behind"}
    killed_writers_leave_what_was_answered_and_no_wrong_page("chain", settings, n_kills=1)


def test_namespaces_of_several_lengths_share_a_file_store(tmp_path: Path) -> None:
    namespaces_of_several_lengths_share_a_store("file", file(tmp_path))
    a_page_of_another_length_is_a_miss("file", file(tmp_path))
