"""A folder that workers share is filled once, and never seen half filled."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest

from tests.shared_folders import shared_folder


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.TempPathFactory:
    """Of a run that has a worker of its own."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    made = pytest.TempPathFactory(tmp_path / "gw0", 3, "all", lambda *_: None, _ispytest=True)
    made.getbasetemp()
    return made


def test_it_is_filled_once_for_all_who_ask(factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    fills: list[Path] = []

    def fill(folder: Path) -> None:
        fills.append(folder)
        (folder / "content").write_text("whole")

    def ask() -> None:
        assert (shared_folder(factory, "one", fill) / "content").read_text() == "whole"

    askers = [Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert fills == [tmp_path / "one"]


def test_what_was_left_half_filled_is_filled_anew(factory: pytest.TempPathFactory) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no such luck")

    with pytest.raises(OSError, match="no such luck"):
        shared_folder(factory, "one", fail)
    assert list(shared_folder(factory, "one", lambda _: None).iterdir()) == []
