"""A third party's distribution, built and installed by pip, found by real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

LIGHT = """
import json, sys
from hicache_core.plugin.manager import backend_class, backend_settings, list_backends
from hicache_core.types import BackendContext
import hicache_core.plugin.dynamic
listed = [(i.name, i.distribution, i.version, i.status) for i in list_backends()]
imported = "hicache_example" in sys.modules
cls = backend_class("example")
backend = cls(backend_settings(cls, {"max_objects": 3}), BackendContext("0" * 16))
backend.open()
backend.set("k", b"value")
answers = [backend.exists("k"), bytes(backend.get("k")).decode(), backend.batch_exists(["k", "l"])]
backend.close()
json.dump({
    "listed": listed, "imported": imported, "answers": answers,
    "heavy": [m for m in ("torch", "numpy", "transformers") if m in sys.modules],
}, sys.stdout)
"""


def run(arguments: list[str], environ: Mapping[str, str]) -> str:
    child = subprocess.run(
        [sys.executable, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_an_installed_third_party_is_discovered_loaded_and_used(example_site: Any) -> None:
    result = json.loads(run(["-c", LIGHT], example_site.environ()))
    assert ["example", "hicache-example", "1.2.3", "installed"] in result["listed"]
    assert result["imported"] is False
    assert result["answers"] == [True, "value", 1]


def test_plugins_and_their_manager_need_no_torch(example_site: Any) -> None:
    assert json.loads(run(["-c", LIGHT], example_site.environ()))["heavy"] == []


def test_hicache_backends_lists_it_as_ok(example_site: Any) -> None:
    arguments = ["-m", "hicache_core.cli.main", "backends", "--json"]
    infos = {info["name"]: info for info in json.loads(run(arguments, example_site.environ()))}
    assert infos["example"] == {
        "name": "example",
        "distribution": "hicache-example",
        "version": "1.2.3",
        "module": "hicache_example.backend",
        "status": "ok",
        "error": "",
        "kind": "storage",
    }
    assert infos["memory"]["status"] == "ok"
