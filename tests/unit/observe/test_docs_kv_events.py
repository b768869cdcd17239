"""docs/kv-events.md is held to the code: settings, media, events, the example."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hicache_core.kv.keys import pack_tokens, page_digests
from hicache_core.observe.event_format import CLEARED, MEDIUM, block_hashes, removed, stored
from hicache_core.observe.events import EventsConfig
from hicache_core.observe.journal import PageRun
from hicache_core.types import Namespace, Tier

PAGE = (Path(__file__).parents[3] / "docs" / "kv-events.md").read_text(encoding="utf-8")
LINES = PAGE.splitlines()


def test_every_setting_has_its_line_and_no_line_is_of_one_that_is_gone() -> None:
    rows = [line.split("|") for line in LINES if line.startswith("| `") and line.count("|") == 4]
    shown = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
    settings = {f.name: str(f.default) or "(empty)" for f in dataclasses.fields(EventsConfig)}
    assert {name: text for name, text in shown.items() if name in settings} == settings
    assert set(shown) - set(settings) == set()


def test_every_setting_of_an_engine_that_is_taken_is_named() -> None:
    for name in ("publisher", "enable_kv_cache_events", "max_queue_size"):
        assert f"`{name}`" in PAGE


def test_every_name_of_a_namespace_is_told() -> None:
    namespace = Namespace(cache_salt="tenant", lora_id="adapter")
    page = PageRun(b"", bytes(32), pack_tokens(range(4)), b"seed")
    added = set(stored(Tier.HOST, page, namespace)) - set(
        stored(Tier.HOST, replace(page, seed=b""))
    )
    assert all(f"`{name}`" in PAGE for name in added | {"lora_name"})


@pytest.mark.parametrize("tier", list(Tier))
def test_every_medium_is_named(tier: Tier) -> None:
    assert f"| `{MEDIUM[tier]}` | {tier.value} |" in LINES


def test_every_event_is_shown_with_its_keys() -> None:
    tokens = pack_tokens(range(4))
    page = PageRun(b"", page_digests(tokens, 4), tokens, b"")
    for event in (stored(Tier.HOST, page), removed(Tier.HOST, page), CLEARED):
        name, *keys = (event["type"], *list(event)[1:])
        cells = ", ".join(f"`{key}`" for key in keys) or "–"
        assert f"| `{name}` | {cells} |" in LINES


def test_the_subscriber_of_the_docs_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    hashes = set(block_hashes(page_digests(pack_tokens(range(8)), 4)))
    assert child.stdout == f"{ {'EXTERNAL': hashes} }\n"
