"""The command line: quick, one clear line for an error, no secret shown."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest

import hicache_core
from hicache_core.cli.main import cli, main, module_of
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import EXTRA, env_name, flag_name

EXTRA_FLAG = "--hicache-storage-backend-extra-config"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HICACHE_")}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-m", "hicache_core.cli.main", *arguments],
        env=clean | {"PYTHONPATH": path, "COLUMNS": "200"} | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in HiCacheConfig.model_fields:
        monkeypatch.delenv(env_name(key), raising=False)


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert caught.value.code is None or isinstance(caught.value.code, int)
    return caught.value.code or 0, out, err


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from hicache_core.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print('MODULES', *sys.modules)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    text, modules = child.stdout.split("MODULES")
    loaded = set(modules.split())
    for name in cli.list_commands(click.Context(cli)):
        assert f"  {name} " in text
        assert f"hicache_core.cli.{name.replace('-', '_')}" not in loaded
    assert {"torch", "numpy", "pydantic", "rich", "transformers", "pluggy"}.isdisjoint(loaded)


def test_every_command_module_has_a_command_and_a_summary() -> None:
    context = click.Context(cli)
    names = cli.list_commands(context)
    assert {"backends", "config", "version"} <= set(names)
    for name in names:
        module = importlib.import_module(f"hicache_core.cli.{module_of(name)}")
        assert isinstance(module.command, click.Command)
        assert module.command.name == name
        assert module.__doc__


def test_config_shows_asked_source_and_in_force(tmp_path: Path) -> None:
    file = tmp_path / "hicache.toml"
    file.write_text("page_size = 16\nhicache_ratio = 4\n")
    child = run(
        *["config", "--json", "--config", str(file), "--hicache-io-backend", "direct"],
        HICACHE_RATIO="3",
    )
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert set(report["settings"]) == set(HiCacheConfig.model_fields)
    assert report["settings"]["page_size"] == {
        "asked": 16,
        "source": f"file {file}",
        "in_force": 16,
    }
    assert report["settings"]["hicache_ratio"]["source"] == "environment HICACHE_RATIO"
    assert report["settings"]["hicache_io_backend"]["source"] == "flag --hicache-io-backend"
    layout = report["settings"]["hicache_mem_layout"]
    assert (layout["asked"], layout["in_force"]) == ("page_first", "layer_first")
    assert any("hicache_mem_layout" in line for line in report["adjustments"])


def test_config_as_text_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = in_process(capsys, "config", "--hicache-size", "10", "--hicache-ratio", "2")
    assert status == 0
    for key in HiCacheConfig.model_fields:
        assert any(line.startswith(key) for line in out.splitlines())
    assert "hicache_ratio: asked for 2.0, using 0.0" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hicache-storage-backend", "reddis"], "did you mean 'redis'"),
        (["--hicache-storage-backend", "file"], "file.path: this setting is required"),
        (
            [
                "--hicache-storage-backend",
                "file",
                "--hicache-storage-backend-extra-config",
                '{"path": "kv", "sise": 1}',
            ],
            "file.sise: unknown setting",
        ),
        (
            [
                "--hicache-storage-backend",
                "chain",
                "--hicache-storage-backend-extra-config",
                '{"links": [{"backend": "file"}]}',
            ],
            "file.path: this setting is required",
        ),
        (["--kv-events-config", '{"endpont": "x"}'], "unknown setting 'endpont'"),
    ],
)
def test_config_of_a_store_that_cannot_be_opened_fails(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    status, _, error = in_process(capsys, "config", *flags)
    assert status == 2
    assert said in error


def test_config_prints_the_schema_of_a_file_with_the_settings_of_the_named_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env_name("hicache_storage_backend"), "redis")
    status, out, _ = in_process(capsys, "config", "--schema")
    assert status == 0
    schema = json.loads(out)
    assert set(schema["properties"]) == set(HiCacheConfig.model_fields)
    assert "sentinels" in schema["properties"][EXTRA]["anyOf"][0]["properties"]


def test_config_takes_the_names_that_sglang_has_for_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = '{"file_path": "kv", "max_size": "20G", "prefetch_threshold": 1}'
    file = ["config", "--hicache-storage-backend", "file"]
    assert in_process(capsys, *file, EXTRA_FLAG, given)[0] == 0
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", "kv")
    assert in_process(capsys, *file)[0] == 0


def test_a_mistyped_variable_is_reported_by_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HICACHE_PAGE_SIZ", "3")
    monkeypatch.setenv("HICACHE_OF_A_PLUGIN", "3")
    for command in ("config", "version"):
        _, _, error = in_process(capsys, command)
        words = "hicache: HICACHE_PAGE_SIZ is ignored; did you mean HICACHE_PAGE_SIZE?"
        assert error.splitlines() == [words]


def test_every_setting_has_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = in_process(capsys, "config", "--help")
    assert status == 0
    for key in HiCacheConfig.model_fields:
        assert flag_name(key) in out


def test_the_flag_pair_turns_a_setting_off(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in [
        ("--no-enable-hierarchical-cache", False),
        ("--enable-hierarchical-cache", True),
    ]:
        _, out, _ = in_process(capsys, "config", "--json", flag)
        assert json.loads(out)["settings"]["enable_hierarchical_cache"]["asked"] is value


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_config_never_shows_a_secret(capsys: pytest.CaptureFixture[str], form: list[str]) -> None:
    extra = '{"password": "hunter2", "url": "redis://u:hunter2@host"}'
    status, out, err = in_process(capsys, "config", *form, flag_name(EXTRA), extra)
    assert status == 0
    assert "hunter2" not in out + err
    assert "redis://***@host" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--page-size", "0"], "page_size = '0' (from flag --page-size): allowed: an integer"),
        (["--hicache-io-backend", "dirct"], "did you mean 'direct'?"),
        ([flag_name(EXTRA), "{"], "is not valid JSON"),
        ([flag_name(EXTRA), "@gone.json"], "file gone.json: no such file (working"),
        (["--config", "gone.toml"], "configuration file gone.toml: no such file (working"),
    ],
)
def test_an_error_of_ours_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    status, out, err = in_process(capsys, "config", *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("hicache: ")
    assert err.count("\n") == 1
    assert problem in err


def test_debug_shows_the_traceback() -> None:
    child = run("--debug", "config", "--page-size", "0")
    assert child.returncode == 1
    assert "Traceback" in child.stderr
    assert "ConfigError: page_size = '0'" in child.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["confg"], "no such command 'confg'; did you mean 'config'?"),
        (["zzzz"], "no such command 'zzzz'; the commands are: "),
        (["config", "--page-siz", "3"], "--page-size"),
    ],
)
def test_an_unknown_word_suggests_the_nearest(
    capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    status, _, err = in_process(capsys, *arguments)
    assert status == 2
    assert problem in err


def test_backends_without_a_check_reads_metadata_only(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = in_process(capsys, "backends", "--no-check", "--json")
    assert status == 0
    infos = {(info["kind"], info["name"]): info for info in json.loads(out)}
    for known in [("storage", "memory"), ("transfer", "tcp")]:
        assert infos[known]["distribution"] == "hicache-core"
        assert infos[known]["status"] == "installed"


def test_backends_as_text_has_one_line_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = in_process(capsys, "backends")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "STATUS", "ERROR"]
    for known in [["memory", "storage", "hicache-core"], ["tcp", "transfer", "hicache-core"]]:
        assert next(line[4] for line in lines if line[:3] == known) == "ok"


def test_version_names_the_core_its_plugins_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = in_process(capsys, "version")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"hicache-core {hicache_core.__version__}"
    for plugin in ("hf3fs", "mooncake", "redis", "s3"):
        assert f"hicache-{plugin} {version(f'hicache-{plugin}')}" in lines
    assert f"python {sys.version_info.major}." in out
    assert in_process(capsys, "--version")[0] == 0


@pytest.mark.parametrize(
    ("environ", "said"),
    [({"HICACHE_PURE_PYTHON": "1"}, "pure Python, since HICACHE_PURE_PYTHON is 1"), ({}, "native")],
)
def test_version_says_whether_the_native_parts_are_in_use(
    environ: dict[str, str], said: str
) -> None:
    """These are what the modules themselves decide, each in a process of its own."""
    child = run("version", **environ)
    assert child.returncode == 0, child.stderr
    assert [f"{part}: {said}" for part in ("keys", "pools", "copies")] == child.stdout.splitlines()[
        -3:
    ]
    decide = (
        "from hicache_core.kv.keys import IMPLEMENTATION\n"
        "from hicache_core.pools.allocator import flip\n"
        "from hicache_core.copies.native import IS_BUILT\n"
        "is_twin = flip.__module__.endswith('_py')\n"
        "print(IMPLEMENTATION != 'pure-python', not is_twin, IS_BUILT)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", decide],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert answer.stdout.split() == [str(said == "native")] * 3


def test_python_m_hicache_core_is_the_command() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "hicache_core", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert child.stdout.strip() == hicache_core.__version__ == version("hicache-core")


def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(
            [sys.executable, "-m", "hicache_core.cli.main", "config"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (child.returncode, child.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in child.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "not enough memory"), (RecursionError(), "nested too deeply")],
)
def test_input_that_is_too_large_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    said: str,
) -> None:
    def fail(**_options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "main", fail)
    status, _, err = in_process(capsys, "version")
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
