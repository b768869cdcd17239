"""The dynamic loader: a class by module or file; what is wrong is named; SGLang's classes run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hicache_core.errors import BrokenBackend, ConfigError, IncompatibleBackend
from hicache_core.plugin.dynamic import load_class, split_settings
from hicache_core.plugin.manager import backend_settings
from hicache_core.storage.base import StorageBackend

OURS = """
from hicache_core.storage.base import BackendConfig, StorageBackend

class Settings(BackendConfig):
    depth: int = 1

class MyBackend(StorageBackend):
    name = "mine"
    Config = Settings
    def get(self, key): return None
    def exists(self, key): return False
    def set(self, key, value): pass

class HalfBackend(StorageBackend):
    name = "half"
    def get(self, key): return None

class Stranger:
    def get(self, key, version): return None
    def exists(self, key): return False
    def set(self, key, value): pass

class Emptiness:
    pass

def function(config, context): pass
"""


def settings(module: str | Path, cls: str = "MyBackend", **more: object) -> dict[str, object]:
    return {"backend_name": "mine", "module_path": str(module), "class_name": cls, **more}


def test_a_class_is_loaded_by_its_dotted_module(site: Any) -> None:
    site.write(**{"pack/__init__": "", "pack/mine": OURS})
    cls = load_class(settings("pack.mine"))
    assert issubclass(cls, StorageBackend)
    assert cls.__module__ == "pack.mine"


def test_a_class_is_loaded_from_a_file_that_is_on_no_path(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "mine.py").write_text(OURS)
    first = load_class(settings(tmp_path / "a" / "mine.py"))
    assert first.name == "mine"
    assert load_class(settings(tmp_path / "a" / "mine.py")) is first
    assert load_class(settings(tmp_path / "b" / "mine.py")) is not first


def test_the_remaining_keys_are_the_backends_own(site: Any) -> None:
    site.write(mine=OURS)
    given = settings("mine", depth=3)
    _, rest = split_settings(given)
    assert backend_settings(load_class(given), rest).model_dump() == {"depth": 3}
    _, rest = split_settings(settings("mine", dept=3))
    with pytest.raises(ConfigError, match=r"mine\.dept: .*did you mean 'depth'"):
        backend_settings(load_class(given), rest)


def test_settings_may_be_json_text(site: Any) -> None:
    site.write(mine=OURS)
    text = '{"backend_name": "x", "module_path": "mine", "class_name": "MyBackend"}'
    assert load_class(text).name == "mine"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ('{"backend_name": ', r"dynamic: text is not valid JSON: .*line 1"),
        ("[]", r"dynamic: value: expected a mapping"),
        ({}, r"backend_name: this setting is required; dynamic\.module_path.*; .*class_name"),
        (settings("m", ""), r"dynamic\.class_name = '': allowed: the name of a class"),
        ({**settings("m"), "module_path": 3}, r"dynamic\.module_path = 3: allowed: a dotted"),
    ],
)
def test_malformed_settings_are_named(given: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_class(given)


@pytest.mark.parametrize("module", ["not_there_at_all", "pack.not_there", "flat.inner", ".rel"])
def test_a_missing_module_tells_where_it_was_looked_for(site: Any, module: str) -> None:
    site.write(flat="", **{"pack/__init__": ""})
    with pytest.raises(BrokenBackend, match=r"no such module in sys\.path") as caught:
        load_class(settings(module))
    assert str(site.directory) in str(caught.value)


def test_a_missing_file_is_named_whole(tmp_path: Path) -> None:
    with pytest.raises(BrokenBackend, match=f"there is no file {tmp_path}/gone.py"):
        load_class(settings(tmp_path / "gone.py"))
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(BrokenBackend, match=r"must end in \.py"):
        load_class(settings(tmp_path / "text.txt"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import a_module_that_nobody_has", "ModuleNotFoundError: No module named 'a_module_that"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_module_that_does_not_load_says_why(site: Any, source: str, problem: str) -> None:
    site.write(bad=source, **{"badpack/__init__": source, "badpack/inner": OURS})
    for module in ("bad", site.directory / "bad.py", "badpack.inner"):
        with pytest.raises(BrokenBackend, match=rf"does not load: {problem}"):
            load_class(settings(module))


def test_a_missing_class_lists_those_that_are_there(site: Any) -> None:
    site.write(mine=OURS)
    with pytest.raises(BrokenBackend, match=r"has no class 'MyBackend2'; its classes are: ") as e:
        load_class(settings("mine", "MyBackend2"))
    assert "HalfBackend, MyBackend" in str(e.value)
    assert "did you mean 'MyBackend'?" in str(e.value)


@pytest.mark.parametrize(
    ("cls", "problem"),
    [
        ("function", r"is not a subclass of hicache_core\.storage\.base\.StorageBackend"),
        ("HalfBackend", r"HalfBackend does not implement exists, set"),
        ("Emptiness", r"Emptiness is not a backend: .*it lacks get, exists, set"),
        ("Stranger", r"Stranger is not a backend: .*set\(key, value\): it takes other arguments"),
    ],
)
def test_a_class_that_is_no_backend_says_what_is_missing(site: Any, cls: str, problem: str) -> None:
    site.write(mine=OURS)
    with pytest.raises(IncompatibleBackend, match=problem):
        load_class(settings("mine", cls))


def test_loading_a_class_of_ours_imports_no_torch(site: Any) -> None:
    site.write(mine=OURS)
    code = (
        "import sys; from hicache_core.plugin.dynamic import load_class;"
        f"load_class({settings('mine')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=site.environ(), check=True, timeout=60)


def test_a_class_in_the_working_directory_is_found_by_console_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first place to look is the folder of the script, not the working directory."""
    (tmp_path / "mine.py").write_text(OURS)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings("mine")))
    command = [str(Path(sys.executable).parent / "hicache"), "config"]
    command += ["--hicache-storage-backend", "dynamic"]
    command += ["--hicache-storage-backend-extra-config", f"@{file}"]

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    assert run(tmp_path).returncode == 0
    elsewhere = run(tmp_path.parent)
    assert elsewhere.returncode == 2
    assert "no such module in sys.path" in elsewhere.stderr
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(BrokenBackend, match=str(tmp_path)):
        load_class(settings("yours"))
    assert sys.path == before


def test_a_config_stays_frozen(site: Any) -> None:
    site.write(mine=OURS)
    config = backend_settings(load_class(settings("mine")), {})
    with pytest.raises(ValidationError):
        config.depth = 4  # type: ignore[attr-defined]


def test_a_class_in_nested_folders_without_init_files_is_loaded(site: Any) -> None:
    """Namespace packages, which nobody has imported before."""
    site.write(**{"outer/inner/mine": OURS})
    assert load_class(settings("outer.inner.mine")).__module__ == "outer.inner.mine"
    with pytest.raises(BrokenBackend, match="no such module in sys"):
        load_class(settings("outer.inner.yours"))
