"""``hicache conformance`` and ``hicache doctor``: what they print and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hicache_core.cli import conformance, doctor
from hicache_core.errors import ConfigError, UnknownBackend
from tests.conformance import defects_data, right

SECRET = "open-sesame"
ROOT = Path(__file__).parents[2]


def dynamic(class_name: str, file: str, **settings: object) -> str:
    """A configuration that names a class of these tests."""
    where = {"backend_name": "x", "module_path": file, "class_name": class_name}
    return json.dumps(where | settings)


def run_conformance(*args: str) -> Result:
    return CliRunner().invoke(conformance.command, [*args, "--quick"])


def test_a_right_class_conforms_and_the_report_says_so(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    config = dynamic("RichBackend", right.__file__, password=SECRET)
    result = run_conformance(
        "dynamic", "--config", config, "--scope", "process", "--json", str(report_file)
    )
    assert result.exit_code == 0, result.output
    assert "backend 'rich' conforms" in result.output
    report = json.loads(report_file.read_text())
    assert report["passed"] is True
    status = {rule["id"]: rule["status"] for rule in report["results"]}
    assert status["lists_by_prefix"] == "passed"
    assert status["secrets_stay_hidden"] == "passed"
    assert status["two_processes"] == "not run"
    assert {figure["unit"] for figure in report["figures"]} == {"us", "MB/s"}
    assert SECRET not in result.output + report_file.read_text()


def test_nothing_is_left_where_the_command_is_called(tmp_path: Path) -> None:
    config = dynamic("RightBackend", right.__file__)
    arguments = ["conformance", "dynamic", "--quick", "--scope", "process", "--config", config]
    command = [sys.executable, "-m", "hicache_core.cli.main", *arguments]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*(tmp_path / "here").iterdir(), *(tmp_path / "tmp").iterdir()] == []


def test_a_wrong_class_ends_with_status_1_and_no_figures() -> None:
    config = dynamic("EmptyIsMissing", defects_data.__file__)
    result = run_conformance("dynamic", "--config", config, "--scope", "process")
    assert result.exit_code == 1
    assert "FAILED   empty_object" in result.output
    assert "backend 'right' does not conform" in result.output
    assert "Performance" not in result.output


def test_what_cannot_be_loaded_or_configured_is_told_before_anything_runs() -> None:
    assert isinstance(run_conformance("no-such-backend").exception, UnknownBackend)
    wrong = run_conformance("memory", "--config", '{"shere": "x"}')
    assert isinstance(wrong.exception, ConfigError)
    assert "shere" in str(wrong.exception)


def test_doctor_finds_a_good_store_well(tmp_path: Path) -> None:
    config = json.dumps({"path": str(tmp_path / "store")})
    result = CliRunner().invoke(doctor.command, ["file", "--config", config])
    assert result.exit_code == 0, result.output
    assert "ok       open" in result.output
    assert "MB/s" in result.output


def test_doctor_ends_with_status_2_at_the_step_that_failed(tmp_path: Path) -> None:
    config = json.dumps({"path": str(tmp_path / "absent" / "store")})
    result = CliRunner().invoke(doctor.command, ["file", "--config", config])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("error    open")


@pytest.mark.parametrize(("level", "status"), [("ok", 0), ("warning", 1), ("error", 2)])
def test_doctor_ends_with_the_status_of_the_worst_finding_and_hides_secrets(
    level: str, status: int, tmp_path: Path
) -> None:
    module = tmp_path / "diagnosing.py"
    module.write_text(
        "from hicache_core.storage.base import Finding\n"
        "from tests.conformance.right import RightBackend\n"
        "class Diagnosing(RightBackend):\n"
        "    def diagnose(self):\n"
        "        password = self.settings.password.get_secret_value()\n"
        f"        yield Finding({level!r}, 'rights', f'the password {{password}} is weak')\n"
    )
    config = dynamic("Diagnosing", str(module), password=SECRET)
    result = CliRunner().invoke(doctor.command, ["dynamic", "--config", config])
    assert result.exit_code == status, result.output
    assert f"{level:8} rights       the password *** is weak" in result.output
    assert SECRET not in result.output
