"""The flags that SGLang gets from us: what they turn into, and what they leave alone."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hicache_core.errors import ConfigError
from hicache_core.integrations.sglang import flags
from hicache_core.integrations.sglang.settings import read_settings


class ServerArgs:
    """A stand-in for SGLang's: the two functions that the flags go through."""

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--hicache-storage-backend", choices=["file", "dynamic"])
        parser.add_argument("--hicache-storage-backend-extra-config")

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> argparse.Namespace:
        return args


class Hooks:
    """A stand-in for SGLang's registry: notes what is registered."""

    def __init__(self) -> None:
        self.registered: list[tuple[str, Any, str]] = []

    def register(self, target: str, hook: Any, hook_type: str) -> None:
        self.registered.append((target, hook, hook_type))


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooks]:
    """Modules under SGLang's names, so that ``install`` finds the stand-ins."""
    made = Hooks()
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry: Any = ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookRegistry = made
    registry.HookType = argparse.Namespace(AFTER="after", BEFORE="before")
    server_args: Any = ModuleType("sglang.srt.server_args")
    server_args.ServerArgs = ServerArgs
    for module in (registry, server_args):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def parsed(hooks: Hooks, *argv: str) -> argparse.Namespace:
    """What SGLang's arguments are, with the hooks that were registered."""
    by_name = {target.rpartition(".")[2]: hook for target, hook, _ in hooks.registered}
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    by_name["add_cli_args"](None, parser)
    args = parser.parse_args(argv)
    by_name["from_cli_args"](ServerArgs, args)
    return args


def test_the_flags_stand_for_the_long_json(hooks: Hooks) -> None:
    flags.install()
    args = parsed(hooks, "--hicache-core", "redis", "--hicache-core-config", '{"url": "redis://x"}')
    assert args.hicache_storage_backend == "dynamic"
    extra = json.loads(args.hicache_storage_backend_extra_config)
    settings = read_settings(extra)
    assert settings.interface_v1
    assert (settings.backend, settings.backend_config) == ("redis", {"url": "redis://x"})
    assert (extra["module_path"], extra["class_name"]) == (
        "hicache_core.integrations.sglang",
        "HiCacheBackend",
    )


def test_without_the_flag_nothing_changes(hooks: Hooks) -> None:
    flags.install()
    for argv in ([], ["--hicache-storage-backend", "file"], ["--hicache-core-config", "{"]):
        args = parsed(hooks, *argv)
        assert args.hicache_storage_backend == ("file" if "file" in argv else None)
        assert args.hicache_storage_backend_extra_config is None


def test_a_file_stays_a_file_and_is_checked_at_once(
    hooks: Hooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags.install()
    monkeypatch.chdir(tmp_path)
    Path("redis.toml").write_text('password = "secret"')
    args = parsed(hooks, "--hicache-core", "redis", "--hicache-core-config", "@redis.toml")
    text = args.hicache_storage_backend_extra_config
    assert json.loads(text)["backend_config"] == f"@{tmp_path / 'redis.toml'}"
    assert "secret" not in text
    assert read_settings(json.loads(text)).backend_config == {"password": "secret"}
    with pytest.raises(ConfigError, match=r"--hicache-core-config: file .*no such file"):
        parsed(hooks, "--hicache-core", "redis", "--hicache-core-config", "@absent.toml")


def test_sglangs_own_keys_of_the_extra_config_are_kept(hooks: Hooks) -> None:
    flags.install()
    own = '{"prefetch_threshold": 64}'
    args = parsed(hooks, "--hicache-core", "file", "--hicache-storage-backend-extra-config", own)
    assert json.loads(args.hicache_storage_backend_extra_config)["prefetch_threshold"] == 64


def test_flags_that_do_not_go_together_are_refused(hooks: Hooks) -> None:
    flags.install()
    with pytest.raises(ConfigError, match="name two storage backends"):
        parsed(hooks, "--hicache-core", "redis", "--hicache-storage-backend", "file")
    with pytest.raises(ConfigError, match=r"--hicache-core-config: text is not valid JSON"):
        parsed(hooks, "--hicache-core", "redis", "--hicache-core-config", "{")


def test_an_sglang_that_has_changed_starts_with_a_sentence_in_the_log(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sentences() -> list[str]:
        caplog.clear()
        flags.install()
        assert hooks.registered == []
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        return [record.getMessage() for record in caplog.records]

    monkeypatch.delattr(ServerArgs, "from_cli_args")
    assert sentences() == [
        "this SGLang does not take the flag --hicache-core (ServerArgs has no from_cli_args);"
        " use --hicache-storage-backend dynamic, as docs/engines.md shows"
    ]
    monkeypatch.delitem(sys.modules, "sglang.srt.plugins.hook_registry")
    assert len(sentences()) == 1


def test_a_flag_of_sglangs_own_with_our_name_is_left_to_it(
    hooks: Hooks, caplog: pytest.LogCaptureFixture
) -> None:
    flags.install()
    parser = argparse.ArgumentParser()
    parser.add_argument("--hicache-core")
    hooks.registered[0][1](None, parser)
    assert [record.getMessage() for record in caplog.records] == [
        "SGLang has a flag of this name already: argument --hicache-core: conflicting option"
        " string: --hicache-core"
    ]


def test_sglangs_plugin_group_finds_the_flags_without_anything_heavy() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["sglang.srt.plugins"]
    assert points == {"hicache": f"{flags.__name__}:{flags.install.__name__}"}
    program = (
        "import sys; import hicache_core.integrations.sglang.flags;"
        "print([name for name in ('torch', 'pydantic', 'yaml', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
