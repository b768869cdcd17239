"""``python -m benchmarks.gpu``: deadlines, wheels, and a dry run as a whole."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import wheels
from benchmarks.gpu.plan import NOT_MEASURED, PARTS

main = pytest.importorskip("benchmarks.gpu.__main__")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=wheels.REPOSITORY,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_tried_unless_a_dry_run_is_asked_for(tmp_path: Path) -> None:
    ended = run("--out", str(tmp_path))
    assert ended.returncode == 2
    assert "sees no GPU" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_a_report_that_says_so(tmp_path: Path, full: bool) -> None:
    only = [] if full else ["--only", "trace"]
    ended = run("--dry-run", "--out", str(tmp_path), *only)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert NOT_MEASURED in ended.stdout
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["run"]["device"] == NOT_MEASURED
    names = [part.name for part in PARTS] if full else ["trace"]
    assert [(part["name"], part["ended"]) for part in written["parts"]] == [
        (name, "well") for name in names
    ]
    traces = [file.name for file in tmp_path.iterdir() if "trace" in file.name]
    assert sorted(traces) == ["gpu-trace-direct.json.gz", "gpu-trace-kernel.json.gz"]


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    hangs = (
        f"import subprocess, sys; its = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print(its.pid, flush=True); its.wait()"
    )
    log = tmp_path / "log"
    with log.open("w") as output:
        began = time.monotonic()
        ended = main.run_until([sys.executable, "-c", hangs], 2.0, output.fileno(), tmp_path)
    assert ended == "out of time"
    assert time.monotonic() - began < 60
    pid = int(log.read_text())
    for _ in range(500):  # whoever adopted it reaps it
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.02)
    else:
        os.kill(pid, 9)
        pytest.fail("the child of a part runs on")


@pytest.mark.parametrize(("code", "how"), [("pass", "well"), ("raise SystemExit(3)", "failed")])
def test_a_part_that_ends_says_how(code: str, how: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as output:
        assert main.run_until([sys.executable, "-c", code], 60, output.fileno(), tmp_path) == how
        assert main.run_until([sys.executable, "-c", code], 0, output.fileno(), tmp_path) == (
            "out of time"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_is_missing_or_too_old_or_too_new_is_named() -> None:
    found = importlib.metadata.version("pydantic")
    major = int(found.partition(".")[0])
    assert wheels.lacking(wheels.requirements() | {"triton": ""}) in ([], ["triton"])
    wanted = {"pydantic": f">={major},<{major + 1}", "no-such-package": ">=1"}
    assert wheels.lacking(wanted) == ["no-such-package"]
    assert wheels.lacking({"pydantic": f">={found}.1"}) == ["pydantic"]
    assert wheels.lacking({"pydantic": f"<{major}"}) == ["pydantic"]


def test_the_list_of_what_to_bring_has_the_command_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wheels, "lacking", lambda wanted: ["pydantic"])
    monkeypatch.setattr(wheels, "is_cuda_build", lambda: False)
    told = wheels.what_to_bring()
    assert f"pydantic=={importlib.metadata.version('pydantic')}" in told
    assert "torch must be a build for CUDA" in told
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"--bring gpu-wheels --python {version} pydantic torch" in told
    monkeypatch.setattr(wheels, "lacking", lambda wanted: [])
    monkeypatch.setattr(wheels, "is_cuda_build", lambda: True)
    assert wheels.what_to_bring().startswith("nothing")


def test_wheels_are_fetched_for_the_other_python_in_the_versions_that_are_tested() -> None:
    command = wheels.bring(Path("there"), "3.12", ["pydantic"])
    assert "--python-version=3.12" in command
    assert "--only-binary=:all:" in command
    assert command[-1] == f"pydantic=={importlib.metadata.version('pydantic')}"
    assert "torch" in " ".join(wheels.bring(Path("there"), "3.12", []))


def wheel(folder: Path, name: str, members: dict[str, str]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return path


def test_only_missing_wheels_are_unpacked_behind_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought, site = tmp_path / "brought", tmp_path / "site"
    brought.mkdir()
    info = "no_such_package-1.0.dist-info/METADATA"
    told = "Metadata-Version: 2.1\nName: no-such-package\nVersion: 1.0\n"
    members = {
        "no_such_package.py": "X = 1",
        info: told,
        "no_such_package-1.0.data/platlib/beside.py": "Y = 2",
        "no_such_package-1.0.data/scripts/run": "#!",
    }
    wheel(brought, "no_such_package", members)
    wheel(brought, "pydantic", {"pydantic/__init__.py": "raise ImportError"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(wheels, "requirements", lambda: {"no-such-package": ">=1"})
    assert wheels.supply(brought, site) == ["no_such_package-1.0-py3-none-any.whl"]
    assert sys.path[-1] == str(site)
    assert (site / "no_such_package.py").read_text() == "X = 1"
    assert (site / "beside.py").read_text() == "Y = 2"
    assert not (site / "pydantic").exists()
    assert not any("scripts" in str(path) for path in site.rglob("*"))


def test_wheels_that_are_not_there_are_named_with_how_to_bring_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(wheels, "requirements", lambda: {"no-such-package": ">=1"})
    with pytest.raises(wheels.WheelsMissing, match=r"(?s)no-such-package.*--bring gpu-wheels"):
        wheels.supply(tmp_path / "nowhere", tmp_path / "site")


def test_a_checkout_that_is_not_installed_has_its_backends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "_is_there", lambda name, versions: False)
    wheels.announce(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.metadata["Name"] == "hicache-core"
    backends = [entry.name for entry in found.entry_points if entry.group == "hicache.backends"]
    assert sorted(backends) == ["file", "memory"]
