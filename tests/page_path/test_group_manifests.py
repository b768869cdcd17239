"""A store with groups of layers, as the commands see it: ``hicache why``, ``hicache scrub``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hicache_core.cli.main import cli
from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.manifest import MANIFEST_HASH
from hicache_core.types import BackendContext
from tests.page_path.grouped_world import MIXES, GroupedWorld, make_grouped_world, spec_of

KEPT = spec_of(Component("k", (2, 64), "float32"))
"""Large enough for a manifest in each namespace."""

WINDOW = Group("swa", GroupKind.WINDOW, spec_of(Component("k", (1, 64), "float32")), window=7)
STATE = Group("mamba", GroupKind.STATE, spec_of(Component("conv_0", (16, 32), "float32")))
SPECS: dict[str, KVSpec] = {
    "large": spec_of(*KEPT.components, groups=(WINDOW, STATE)),
    "large state alone": spec_of(groups=(STATE,)),
}
IDS = [*range(40)]


@pytest.fixture(autouse=True)
def _large_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, spec in SPECS.items():
        monkeypatch.setitem(MIXES, name, spec)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    return {"path": str(tmp_path / "kv")}


def filled(mix: str, settings: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Stores a prompt; the namespaces of the full pages and of each group."""
    world: GroupedWorld = make_grouped_world(mix, backend="file", storage=dict(settings))
    world.request(IDS)
    assert world.cache.flush(10.0)
    assert world.cache.parts.storage is not None
    attached = world.cache.parts.storage.current
    assert attached is not None
    groups = [group.name for group in world.pool.spec.groups]
    spaces = dict(zip(groups, attached.group_namespaces, strict=True))
    world.close()
    return attached.namespace, spaces


def run(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [command, *arguments])


def why(settings: dict[str, str], ids: list[int], *more: str) -> Result:
    config = ["--backend", "file", "--config", json.dumps(settings)]
    return run("why", json.dumps(ids), *config, *more)


def test_a_prompt_that_is_stored_with_its_units_is_no_miss(settings: dict[str, str]) -> None:
    """The cache need not be named: its groups are no caches of their own."""
    filled("large", settings)
    shown = why(settings, IDS)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert "stored      10 leading pages, 40 tokens" in lines
    assert "group       swa, window of 7 tokens: 10 units of the prompt are stored" in lines
    assert "group       mamba, state: 4 units of the prompt are stored" in lines
    assert "usable      10 leading pages, 40 tokens" in lines


def test_a_group_that_lacks_units_cuts_the_prompt(settings: dict[str, str]) -> None:
    filled("large", settings)
    shown = why(settings, [*IDS[:32], *range(100, 108)])
    assert shown.exit_code == 1
    lines = shown.output.splitlines()
    assert "stored      8 leading pages, 32 tokens" in lines
    assert any("group       mamba" in line and "page 7" in line for line in lines)
    assert "usable      6 leading pages, 24 tokens" in lines
    assert any(line.startswith("why         cut by group mamba") for line in lines)
    document = json.loads(why(settings, [*IDS[:32], 1, 2, 3, 4], "--json").output)
    assert (document["n_stored"], document["n_usable"], document["cut_by"]) == (8, 6, "mamba")
    assert [group["group"]["name"] for group in document["groups"]] == ["swa", "mamba"]


@contextmanager
def store(settings: dict[str, str]) -> Iterator[FileBackend]:
    """The store itself, without seals."""
    backend = FileBackend(FileConfig(path=Path(settings["path"])), BackendContext("0" * 16))
    backend.open()
    with closing(backend):
        yield backend


def test_a_damaged_unit_counts_as_missing(settings: dict[str, str]) -> None:
    _, spaces = filled("large", settings)
    with store(settings) as backend:
        keys = [key for key in backend.list_keys(f"{spaces['swa']}/") if MANIFEST_HASH not in key]
        assert len(keys) == 10
        for key in keys:
            value = backend.get(key)
            assert value is not None
            data = bytearray(value)
            data[-1] ^= 1
            backend.delete([key])
            backend.set(key, data)
    document = json.loads(why(settings, IDS, "--json").output)
    assert (document["n_stored"], document["n_usable"], document["cut_by"]) == (10, 0, "swa")
    assert document["groups"][0]["n_units"] == 10


def test_a_page_that_is_missing_is_not_found_among_the_units(settings: dict[str, str]) -> None:
    """They have the digests of their pages, in namespaces of their own."""
    namespace, _ = filled("large", settings)
    with store(settings) as backend:
        keys = [key for key in backend.list_keys(f"{namespace}/") if MANIFEST_HASH not in key]
        backend.delete(keys)
    document = json.loads(why(settings, IDS, "--json").output)
    assert document["n_stored"] == 0
    assert document["miss"]["cause"] == "never_stored"


def test_a_model_of_states_alone_is_looked_up_by_its_snapshots(settings: dict[str, str]) -> None:
    filled("large state alone", settings)
    shown = why(settings, IDS)
    assert shown.exit_code == 0, shown.output
    assert "usable      10 leading pages, 40 tokens" in shown.output
    assert "leading pages, 40 tokens\ngroup" not in shown.output
    assert why(settings, [*IDS[:32], 1, 2, 3, 4]).exit_code == 1


def test_scrub_checks_units_and_names_their_groups(settings: dict[str, str]) -> None:
    _, spaces = filled("large", settings)
    shown = run("scrub", "file", "--config", json.dumps(settings))
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    rows = {tuple(line.split()[:3]) for line in lines}
    assert (spaces["swa"], "good", "11") in rows  # 10 units and the manifest
    assert (spaces["mamba"], "good", "5") in rows
    (swa,) = [line for line in lines if line.startswith(f"{spaces['swa']} (")]
    assert "group swa: a window of 7, page size 4" in swa
    (mamba,) = [line for line in lines if line.startswith(f"{spaces['mamba']} (")]
    assert "group mamba: a state, page size 4" in mamba
