"""``hicache scrub``: its report, its exit status, and what it leaves in the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.types import BackendContext
from tests.unit.cli.test_cli import in_process
from tests.unit.storage.test_scrub import NAMESPACES, flipped, key_of, sealed

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Settings of a file store with five good objects, a corrupt one and one without a seal."""
    backend = FileBackend(FileConfig(path=tmp_path / "store"), BackendContext("0" * 16))
    backend.open()
    for n in range(5):
        backend.set(key_of(n), sealed(key_of(n)))
    bad = key_of(5, NAMESPACES[1])
    backend.set(bad, flipped(bad, 100, 80))
    backend.set("alien/x", b"not ours")
    backend.close()
    return json.dumps({"path": str(tmp_path / "store")})


def test_a_dry_run_tells_and_removes_nothing(store: str, capsys: Capsys) -> None:
    for _ in range(2):
        status, out, err = in_process(capsys, "scrub", "file", "--config", store, "--dry-run")
        assert status == 1
        assert f"corrupt       {key_of(5, NAMESPACES[1])}" in out
        assert "unknown       alien/x" in out
        assert "7 objects, 992 bytes checked; 1 would be removed" in out
        assert err == "", "progress is for terminals"


def test_it_removes_what_is_bad_and_is_clean_then(store: str, capsys: Capsys) -> None:
    status, out, _ = in_process(capsys, "scrub", "file", "--config", store, "--json")
    assert status == 1
    assert json.loads(out) == {
        "backend": "file",
        "dry_run": False,
        "objects": 7,
        "nbytes": 992,
        "bad": 1,
        "removed": 1,
        "namespaces": {
            "": {"unknown": {"objects": 1, "nbytes": 8}},
            NAMESPACES[0]: {"good": {"objects": 5, "nbytes": 820}},
            NAMESPACES[1]: {"corrupt": {"objects": 1, "nbytes": 164}},
        },
    }
    status, out, _ = in_process(capsys, "scrub", "file", "--config", store)
    assert status == 0
    assert "6 objects, 828 bytes checked; 0 removed" in out
    status, out, _ = in_process(capsys, "scrub", "file", "--config", store, "--remove-unknown")
    assert status == 1
    assert "6 objects, 828 bytes checked; 1 removed" in out


def test_only_a_part_is_checked_if_asked(store: str, capsys: Capsys) -> None:
    asked = ["scrub", "file", "--config", store, "--dry-run"]
    status, out, _ = in_process(capsys, *asked, "--namespace", NAMESPACES[0])
    assert (status, "5 objects" in out) == (0, True)
    _, out, _ = in_process(capsys, *asked, "--limit", "3")
    assert "3 objects" in out


def test_what_cannot_be_scrubbed_is_one_line_and_status_2(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "file").write_bytes(b"")
    settings = json.dumps({"path": str(tmp_path / "file")})
    status, out, err = in_process(capsys, "scrub", "file", "--config", settings)
    assert (status, out) == (2, "")
    assert err.startswith("hicache: ")
    assert err.count("\n") == 1


def test_at_a_mistyped_path_no_store_is_made(tmp_path: Path, capsys: Capsys) -> None:
    settings = json.dumps({"path": str(tmp_path / "typo")})
    why = ("why", "1,2,3", "--backend", "file", "--namespace", "0" * 16)
    for asked in (("scrub", "file"), ("scrub", "file", "--dry-run"), why):
        status, _, err = in_process(capsys, *asked, "--config", settings)
        assert status == 2
        assert "typo holds no store of the file backend; check path" in err
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_list_says_so(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "bare.py").write_text(
        "from hicache_core.storage.base import StorageBackend\n"
        "class Bare(StorageBackend):\n"
        "    name = 'bare'\n"
        "    def get(self, key): return None\n"
        "    def exists(self, key): return False\n"
        "    def set(self, key, value): pass\n"
    )
    settings = json.dumps(
        {
            "backend_name": "bare",
            "module_path": str(tmp_path / "bare.py"),
            "class_name": "Bare",
        }
    )
    status, _, err = in_process(capsys, "scrub", "dynamic", "--config", settings)
    assert status == 2
    assert "backend 'bare' cannot list its keys" in err
