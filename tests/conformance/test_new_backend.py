"""``hicache new-backend`` writes a distribution that installs, is listed and passes the kit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from hicache_core.cli.new_backend import command, render
from hicache_core.errors import BackendError, ConfigError
from hicache_core.testing.recipe import Recipe
from tests.conformance.installed import run


def test_what_it_writes_installs_is_listed_and_passes(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["my-store", "--directory", str(tmp_path)])
    assert result.exit_code == 0, result.output
    project, target = tmp_path / "hicache-my-store", tmp_path / "site"
    text = "".join(p.read_text() for p in project.rglob("*") if p.is_file())
    assert "@" not in text.replace("@hookimpl", "").replace("@pytest", "")
    run("pip install .", cwd=project, target=target)
    listed = json.loads(
        run("python -m hicache_core.cli.main backends --json", cwd=tmp_path, target=target)
    )
    (mine,) = [info for info in listed if info["name"] == "my-store"]
    assert (mine["distribution"], mine["status"]) == ("hicache-my-store", "ok")
    told = run("python -m pytest -q -p no:cacheprovider", cwd=project, target=target)
    assert "failed" not in told
    assert "skipped" not in told
    assert "passed" in told


@pytest.mark.parametrize(
    "name", ["", "My", "1a", "a b", "a/b", "../a", "a--b", "-a", "class", "dynamic", "memory", "é"]
)
def test_a_name_that_cannot_be_used_is_refused_and_nothing_written(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        render(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_is_an_error_of_the_store_in_every_call(tmp_path: Path) -> None:
    project = render("my-store", tmp_path)
    (file,) = project.glob("src/*/backend.py")
    where = {"backend_name": "x", "module_path": str(file), "class_name": "MyStoreBackend"}
    backend = Recipe.named("dynamic", where | {"directory": str(tmp_path / "store")}).make()
    backend.open()
    too_long = "k" * 300  # no file can have such a name
    calls: list[Callable[[], object]] = [
        lambda: backend.get(too_long),
        lambda: backend.exists(too_long),
        lambda: backend.set(too_long, b"x"),
        lambda: backend.delete([too_long]),
    ]
    for call in calls:
        with pytest.raises(BackendError, match="File name too long"):
            call()
    backend.close()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    target = render("mine", tmp_path)
    (target / "README.md").write_text("my own words")
    with pytest.raises(ConfigError, match="exists already"):
        render("mine", tmp_path)
    assert (target / "README.md").read_text() == "my own words"
