"""Discovery: from metadata alone; only the named plugin is loaded; a broken one harms nobody."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from hicache_core.errors import (
    BrokenBackend,
    ConfigError,
    HiCacheError,
    IncompatibleBackend,
    UnknownBackend,
)
from hicache_core.plugin.check import check_backends
from hicache_core.plugin.manager import (
    BackendInfo,
    backend_class,
    backend_settings,
    list_backends,
)

BACKEND = """
from hicache_core.plugin import hookimpl
from hicache_core.storage.base import StorageBackend

class Backend(StorageBackend):
    name = "NAME"
    def get(self, key): return None
    def exists(self, key): return False
    def set(self, key, value): pass

@hookimpl
def hicache_backends():
    return [Backend]
"""

BROKEN = {
    "raises": ("raise RuntimeError('no licence')", r"RuntimeError: no licence"),
    "syntax": ("def f(:\n", r"SyntaxError"),
    "missing": ("import a_module_that_nobody_has", r"ModuleNotFoundError.*nobody_has"),
    "exits": ("raise SystemExit(3)", r"SystemExit: 3"),
    "hookless": ("", r"has no hookimpl hicache_backends\(\)"),
    "asks": (
        BACKEND.replace("hicache_backends()", "hicache_backends(config)"),
        r"PluginValidationError",
    ),
    "hook_raises": (BACKEND.replace("return [Backend]", "raise KeyError('x')"), r"KeyError: 'x'"),
    "no_list": (BACKEND.replace("[Backend]", "Backend"), r"must return a list"),
    "empty": (BACKEND.replace("[Backend]", "[]"), r"are named: none"),
    "renamed": (BACKEND.replace("NAME", "other"), r"named 'renamed', but .*'other'"),
}

INCOMPATIBLE = {
    "instance": (BACKEND.replace("[Backend]", "[3]"), r"3 is not a subclass of"),
    "stranger": (
        BACKEND.replace("(StorageBackend)", ""),
        r"Backend is not a subclass of .*\.Storage",
    ),
    "abstract": (
        BACKEND.replace("def set", "def put"),
        r"Backend does not implement set",
    ),
    "nameless": (BACKEND.replace('name = "NAME"', ""), r"has no class attribute name"),
    "future": (
        BACKEND.replace('name = "NAME"', 'name = "future"; api_version = 7'),
        r"hicache-future 1.0 has api_version 7, .* has 1; upgrade hicache-core",
    ),
    "past": (
        BACKEND.replace('name = "NAME"', 'name = "past"; api_version = 0'),
        r"api_version 0, .*; upgrade the plugin",
    ),
    "texty": (
        BACKEND.replace('name = "NAME"', 'name = "texty"; api_version = "1"'),
        r"api_version '1' is not an integer",
    ),
    "configless": (
        BACKEND.replace('name = "NAME"', 'name = "configless"; Config = dict'),
        r"Config is not a pydantic model",
    ),
}


def good(name: str) -> str:
    return BACKEND.replace("NAME", name)


def info_of(name: str) -> BackendInfo:
    (info,) = [info for info in list_backends() if info.name == name]
    return info


def test_a_plugin_is_found_by_metadata_and_imported_only_when_named(site: Any) -> None:
    site.add("hicache-one", {"one": "mod_one"}, version="2.5", mod_one=good("one"))
    site.add("hicache-two", {"two": "mod_two"}, mod_two=good("two"))
    assert info_of("one") == BackendInfo("one", "hicache-one", "2.5", "mod_one", "installed")
    assert {"mod_one", "mod_two"}.isdisjoint(sys.modules)
    assert backend_class("one").name == "one"
    assert "mod_two" not in sys.modules


def test_one_module_may_offer_several_backends(site: Any) -> None:
    source = good("one") + good("two").replace("[Backend]", "[Backend, One]").replace(
        "class Backend", "One = Backend\nclass Backend"
    )
    site.add("hicache-pair", {"one": "mod", "two": "mod"}, mod=source)
    assert [backend_class(name).name for name in ("one", "two")] == ["one", "two"]


def test_the_cores_own_backends_come_through_the_same_entry_points() -> None:
    infos = {info.name: info for info in list_backends()}
    for name in ("file", "memory"):
        assert infos[name].distribution == "hicache-core"
        assert infos[name].module == "hicache_core.plugin.builtin"
    assert backend_class("memory").name == "memory"


def test_listing_does_not_even_run_the_package_that_holds_the_module(site: Any) -> None:
    site.add(
        "hicache-deep",
        {"deep": "deep_package.backend"},
        **{"deep_package/__init__": "raise RuntimeError", "deep_package/backend": good("deep")},
    )
    assert info_of("deep").status == "installed"
    assert "deep_package" not in sys.modules


@pytest.mark.parametrize("module", ["not_there", "there.not_there", "flat.inner"])
def test_a_module_that_is_not_there_is_seen_without_loading(site: Any, module: str) -> None:
    site.add("hicache-gone", {"gone": module}, flat="", **{"there/__init__": ""})
    info = info_of("gone")
    assert info.status == "broken"
    assert f"module {module!r} is missing; reinstall hicache-gone 1.0" in info.error


def test_malformed_metadata_harm_nobody(site: Any) -> None:
    site.add("hicache-odd", {"odd": "not a module!"})
    (site.directory / "hicache_odd-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\n"
    )
    info = info_of("odd")
    assert (info.distribution, info.version, info.status) == ("", "", "broken")
    assert "module 'not a module!' is missing" in info.error
    with pytest.raises(BrokenBackend, match="'odd' of an unknown distribution does not load"):
        backend_class("odd")
    assert backend_class("memory").name == "memory"


def test_a_distribution_that_is_on_the_path_twice_is_one(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("hicache-one", {"one": "mod_one"}, mod_one=good("one"))
    shutil.copytree(site.directory, tmp_path / "older")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "older")])
    assert info_of("one").status == "installed"
    assert backend_class("one").name == "one"


def test_an_unknown_name_lists_what_is_there_and_the_nearest(site: Any) -> None:
    site.add("hicache-one", {"tapes": "mod_one"}, mod_one=good("tapes"))
    with pytest.raises(UnknownBackend) as caught:
        backend_class("tape")
    message = str(caught.value)
    installed = ", ".join(sorted(info.name for info in list_backends()))
    assert f"no backend named 'tape' is installed; found: {installed}" in message
    assert {"file", "memory", "tapes"} <= set(installed.split(", "))
    assert "did you mean 'tapes'?" in message
    assert "pip install" not in message


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("redis", " (redis comes with: pip install hicache-redis)"),
        ("reddis", "; did you mean 'redis'? (redis comes with: pip install hicache-redis)"),
        ("cassandra", ""),
    ],
)
def test_only_plugins_that_we_publish_are_to_be_installed(
    site: Any, monkeypatch: pytest.MonkeyPatch, name: str, ending: str
) -> None:
    monkeypatch.setattr(sys, "path", [str(site.directory)])
    site.add("hicache-one", {"one": "mod_one"}, mod_one=good("one"))
    with pytest.raises(UnknownBackend) as caught:
        backend_class(name)
    assert str(caught.value) == f"no backend named {name!r} is installed; found: one{ending}"


def test_what_a_killed_pip_moved_aside_is_not_installed(site: Any) -> None:
    site.add("hicache-one", {"one": "mod_one"}, mod_one=good("one"))
    info = site.directory / "hicache_one-1.0.dist-info"
    shutil.copytree(info, site.directory / "~icache_one-1.0.dist-info")
    assert info_of("one").status == "installed"
    assert backend_class("one").name == "one"
    shutil.rmtree(info)
    with pytest.raises(UnknownBackend):
        backend_class("one")


@pytest.mark.parametrize("text", [b"[hicache.backends]\nno equals sign\n", b"\xff\xfe\x00"])
def test_entry_points_that_cannot_be_read_hide_no_others(
    site: Any, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    site.add("unrelated", {"x": "y"})
    (site.directory / "unrelated-1.0.dist-info" / "entry_points.txt").write_bytes(text)
    site.add("hicache-one", {"one": "mod_one"}, mod_one=good("one"))
    assert info_of("one").status == "installed"
    assert backend_class("one").name == "one"
    assert "cannot read the entry points of unrelated-1.0.dist-info, reinstall it" in caplog.text


def test_metadata_of_distributions_without_a_backend_is_not_read(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Hundreds may be installed, and each would take a millisecond."""
    site.add("unrelated", {})
    (site.directory / "unrelated-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    site.add("hicache-one", {"one": "mod_one"}, mod_one=good("one"))
    assert backend_class("one").name == "one"
    assert caplog.text == ""


def test_two_distributions_with_one_name_are_both_named(site: Any) -> None:
    site.add("hicache-a", {"twin": "mod_a"}, mod_a=good("twin"))
    site.add("hicache-b", {"twin": "mod_b"}, version="2.0", mod_b=good("twin"))
    origins = "one from hicache-a 1.0 and one from hicache-b 2.0"
    expected = f"two backends are named 'twin': {origins}; uninstall one of them"
    with pytest.raises(BrokenBackend, match=expected):
        backend_class("twin")
    twins = [info for info in list_backends() if info.name == "twin"]
    assert [info.status for info in twins] == ["broken", "broken"]
    assert all(expected in info.error for info in twins)
    assert {"mod_a", "mod_b"}.isdisjoint(sys.modules)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_says_why_and_harms_nobody(site: Any, name: str) -> None:
    source, problem = BROKEN[name]
    site.add("hicache-broken", {name: "broken_mod"}, broken_mod=source)
    site.add("hicache-good", {"good": "good_mod"}, good_mod=good("good"))
    with pytest.raises(BrokenBackend, match=problem) as caught:
        backend_class(name)
    assert f"backend {name!r} of hicache-broken 1.0" in str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert backend_class("good").name == "good"


@pytest.mark.parametrize("name", INCOMPATIBLE)
def test_what_is_no_backend_says_what_is_missing(site: Any, name: str) -> None:
    source, problem = INCOMPATIBLE[name]
    site.add(f"hicache-{name}", {name: "odd_mod"}, odd_mod=source.replace("NAME", name))
    with pytest.raises(IncompatibleBackend, match=problem):
        backend_class(name)


def test_the_check_tells_ok_from_broken_in_child_processes(site: Any) -> None:
    site.add("hicache-good", {"good": "good_mod"}, good_mod="print('noise')\n" + good("good"))
    site.add("hicache-bad", {"bad": "bad_mod"}, bad_mod=BROKEN["raises"][0])
    site.add("hicache-crash", {"crash": "crash_mod"}, crash_mod="import os; os._exit(7)")
    site.add("hicache-gone", {"gone": "gone_mod"})
    added = {"good", "bad", "crash", "gone"}
    infos = [info for info in list_backends() if info.name in added]
    checked = {info.name: info for info in check_backends(infos)}
    assert {name: info.status for name, info in checked.items()} == {
        "good": "ok",
        "bad": "broken",
        "crash": "broken",
        "gone": "broken",
    }
    assert "RuntimeError: no licence" in checked["bad"].error
    assert "exit status 7" in checked["crash"].error
    assert not any(name.endswith("_mod") for name in sys.modules)


def test_a_plugin_that_hangs_while_it_loads_is_broken(site: Any) -> None:
    site.add("hicache-slow", {"slow": "slow_mod"}, slow_mod="import time; time.sleep(60)")
    (info,) = check_backends([info_of("slow")], timeout_s=1)
    assert (info.status, info.error) == ("broken", "did not load within 1 s")


def test_settings_are_checked_by_the_backends_own_config(site: Any) -> None:
    source = """
        from pydantic import Field
        from hicache_core.storage.base import BackendConfig
        class Settings(BackendConfig):
            path: str
            depth: int = Field(2, ge=1)
            password: int = 0
    """
    site.add("hicache-set", {"set": "set_mod"}, settings_mod=source, set_mod=good("set"))
    cls = backend_class("set")
    cls.Config = __import__("settings_mod").Settings
    assert backend_settings(cls, {"path": "/x"}).model_dump() == {
        "path": "/x",
        "depth": 2,
        "password": 0,
    }
    refused: list[tuple[dict[str, object], str]] = [
        ({}, r"set\.path: this setting is required"),
        ({"path": "/x", "dept": 1}, r"set\.dept: unknown setting; did you mean 'depth'"),
        ({"path": "/x", "zzz": 1}, r"set\.zzz: .*; the settings are: path, depth, password"),
        ({"path": "/x", "depth": 0}, r"set\.depth = 0: .*greater than or equal to 1"),
        ({"path": "/x", "password": "hunter2"}, r"set\.password = '\*\*\*'"),
    ]
    for settings, problem in refused:
        with pytest.raises(ConfigError, match=problem) as caught:
            backend_settings(cls, settings)
        assert "hunter2" not in str(caught.value)


def test_every_error_is_of_our_tree(site: Any) -> None:
    for name, (source, _) in (BROKEN | INCOMPATIBLE).items():
        site.add(f"hicache-{name}", {name: f"mod_{name}"}, **{f"mod_{name}": source})
        with pytest.raises(HiCacheError):
            backend_class(name)
