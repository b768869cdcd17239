"""A backend is named in one way, ``NAME --config JSON|@file``, and closed whatever happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hicache_core.cli._ask import base_of, with_scheme
from hicache_core.cli._backend import BackendChoice, Cannot, able, names_backend
from hicache_core.errors import BackendUnavailable, ConfigError
from hicache_core.storage.base import Listable, StorageBackend
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.types import BackendContext
from tests.unit.cli.test_cli import in_process
from tests.unit.storage.test_scrub import key_of, sealed

Capsys = pytest.CaptureFixture[str]


def put(path: Path, *numbers: int) -> None:
    with closing(FileBackend(FileConfig(path=path, io_threads=1), BackendContext("0" * 16))) as b:
        b.open()
        for n in numbers:
            b.set(key_of(n), sealed(key_of(n)))


def scrubbed(capsys: Capsys, name: str, settings: object) -> int:
    """The number of objects that ``hicache scrub`` finds."""
    asked = ["scrub", name, "--dry-run", "--json", "--config", json.dumps(settings)]
    status, out, err = in_process(capsys, *asked)
    assert status == 0, err
    return int(json.loads(out)["objects"])


def test_the_extra_config_of_a_server_is_accepted_as_it_is(tmp_path: Path, capsys: Capsys) -> None:
    put(tmp_path / "kv", 1, 2)
    settings = {"path": str(tmp_path / "kv"), "prefetch_threshold": 1, "guard": {"retries": 0}}
    assert scrubbed(capsys, "file", settings) == 2
    links = [{"backend": "file", "name": n, "config": {"path": str(tmp_path / n)}} for n in "ab"]
    put(tmp_path / "a", 1, 2, 3)
    put(tmp_path / "b", 3, 4)
    assert scrubbed(capsys, "chain", {"links": links, "write": "behind"}) == 4


def test_the_tilde_is_the_home(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "kv", 1)
    assert scrubbed(capsys, "file", {"path": "~/kv"}) == 1
    assert FileConfig(path=Path("~/kv")).path == tmp_path / "kv"


def test_settings_may_be_in_a_file(tmp_path: Path, capsys: Capsys) -> None:
    put(tmp_path / "kv", 1)
    (tmp_path / "store.toml").write_text(f'path = "{tmp_path}/kv"\n')
    asked = ("scrub", "file", "--dry-run", "--config", f"@{tmp_path}/store.toml")
    status, out, _ = in_process(capsys, *asked)
    assert (status, "1 objects" in out) == (0, True)


def test_a_store_is_made_by_a_command_that_stores_and_by_no_other(tmp_path: Path) -> None:
    choice = BackendChoice("file", {"path": tmp_path / "kv"})
    for opened in (choice.reading, choice.changing):
        with (
            pytest.raises(BackendUnavailable, match="holds no store of the file backend"),
            opened(),
        ):
            pass
        assert list(tmp_path.iterdir()) == []
    with choice.writing() as backend:
        backend.set(key_of(1), b"x")
    with choice.reading() as backend:
        assert backend.exists(key_of(1))


def test_a_backend_is_closed_at_the_end_whatever_happens(tmp_path: Path) -> None:
    put(tmp_path / "kv", 1)
    choice = BackendChoice("file", {"path": tmp_path / "kv"})
    with pytest.raises(ZeroDivisionError), choice.changing() as backend:
        1 / 0  # noqa: B018 - an error of the command
    with pytest.raises(RuntimeError, match="not open"):
        backend.exists(key_of(1))


def test_objects_of_another_process_are_not_looked_for() -> None:
    with pytest.raises(BackendUnavailable, match="'memory' keeps its objects in the process"):
        BackendChoice("memory", {}).reading().__enter__()


def test_what_a_backend_cannot_do_is_one_sentence_and_status_3() -> None:
    class Bare(StorageBackend):
        name = "bare"

        def get(self, key: str) -> None:
            raise AssertionError(key)

        def exists(self, key: str) -> bool:
            raise AssertionError(key)

        def set(self, key: str, value: object) -> None:
            raise AssertionError(key)

    with pytest.raises(Cannot, match=r"backend 'bare' cannot list its keys \(it is not") as error:
        able(Bare(Bare.Config(), BackendContext("0" * 16)), Listable, "list its keys")
    assert error.value.exit_code == 3


def test_a_command_may_name_two_backends() -> None:
    found: list[BackendChoice] = []

    @click.command()
    @names_backend("source", "source-config", "SOURCE")
    @names_backend("target", "target-config", "TARGET")
    def copy(source: BackendChoice, target: BackendChoice) -> None:
        found.extend([source, target])

    words = ["redis", "file", "--target-config", '{"path": "kv"}']
    assert CliRunner().invoke(copy, words).exit_code == 0
    assert found == [BackendChoice("redis", {}), BackendChoice("file", {"path": "kv"})]
    failed = CliRunner().invoke(copy, ["redis", "file", "--source-config", "{"])
    assert isinstance(failed.exception, ConfigError)
    assert str(failed.exception).startswith("--source-config: text is not valid JSON")
    assert "SOURCE TARGET" in CliRunner().invoke(copy, ["--help"]).output


def test_doctor_prints_json_and_refuses_a_store_that_is_only_read(
    tmp_path: Path, capsys: Capsys
) -> None:
    settings = {"path": str(tmp_path / "kv")}
    status, out, _ = in_process(
        capsys, "doctor", "file", "--config", json.dumps(settings), "--json"
    )
    findings = json.loads(out)
    assert status == max(["ok", "warning", "error"].index(one["level"]) for one in findings)
    assert {"open", "round trip", "speed"} <= {one["topic"] for one in findings}
    locked = json.dumps(settings | {"read_only": True})
    for command in ("doctor", "conformance"):
        status, out, err = in_process(capsys, command, "file", "--config", locked)
        assert (status, out) == (2, "")
        assert "is read_only, and the command would change its store" in err


@pytest.mark.parametrize(
    "words",
    [
        ["1,2,3", "--backend", "file"],
        ["file", "1,2,3"],
    ],
)
def test_why_takes_the_backend_as_an_argument_and_as_an_option(
    words: list[str], tmp_path: Path, capsys: Capsys
) -> None:
    put(tmp_path / "kv", 1)
    settings = json.dumps({"path": str(tmp_path / "kv")})
    asked = ("why", *words, "--config", settings, "--namespace", "0" * 16, "--page-size", "2")
    status, out, _ = in_process(capsys, *asked)
    assert (status, "3 tokens: 1 whole pages of 2 tokens" in out) == (1, True)


@pytest.mark.parametrize("words", [["1,2,3"], ["file", "1,2,3", "--backend", "file"], []])
def test_why_without_a_backend_or_with_two_is_a_usage_error(
    words: list[str], capsys: Capsys
) -> None:
    assert in_process(capsys, "why", *words)[0] == 2


@pytest.mark.parametrize("spelled", [with_scheme, base_of])
def test_an_address_may_lack_its_scheme(spelled: Callable[[str], str]) -> None:
    assert spelled("127.0.0.1:30000") == "http://127.0.0.1:30000"
    assert spelled("localhost") == "http://localhost"
    assert spelled("https://cache.example") == "https://cache.example"
