"""The page in a real browser: with data, without, on a phone, and when the server goes away.

Pictures are kept in ``build/screenshots``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hicache_core.observe import http
from hicache_core.observe.http import StatusPages, StatusServer
from hicache_core.observe.page.answers import Answer
from hicache_core.observe.windows import Watch
from tests.browser.chromium import PROGRAM, Chromium
from tests.browser.scene import busy_world, url_of
from tests.page_path.world import World, ids, make_world
from tests.unit.observe.worlds import full_snapshot, group, transfers

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="Debian's chromium is not installed (tools/debian-packages.sh)"
)

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
LIVE = "document.getElementById('link')?.dataset.state === 'live'"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
CHART_NOW = "document.querySelector('#charts .now')?.textContent"
TEXT = "document.body.innerText"
UNNAMED = """
[...document.querySelectorAll('button, input, [role=button], svg[role], a')].filter((node) =>
  node.checkVisibility() && !node.textContent.trim() && !node.getAttribute('aria-label') &&
  !node.labels?.length).length
"""
CONTRAST = """
(() => {
  const channels = (color) => color.match(/[0-9.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((one) => one / 255)
    .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if ((channels(color)[3] ?? 1) === 1) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const kinds = 'h1, h2, h3, p, dt, dd, td, th, button, .chip, label';
  const texts = [...document.querySelectorAll(kinds)]
    .filter((node) => node.checkVisibility() && node.innerText?.trim());
  return Math.min(...texts.map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    made = Chromium(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


@pytest.fixture
def busy(worlds: list[World]) -> World:
    worlds.append(busy_world())
    return worlds[-1]


def wait_stepping(browser: Chromium, world: World, script: str) -> None:
    """As ``wait_for``, while the engine takes its steps."""
    for _ in range(300):
        if browser.evaluate(script):
            return
        world.cache.poll()
        world.cache.wait(0.05)
    raise AssertionError(f"never true: {script}")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (360, False)])
def test_a_busy_cache_is_seen_whole(browser: Chromium, busy: World, width: int, dark: bool) -> None:
    browser.open(url_of(busy), width=width, dark=dark)
    wait_stepping(browser, busy, f"{LIVE} && document.querySelectorAll('#tree g').length > 5")
    name = f"busy-{width}{'-dark' if dark else ''}"
    browser.evaluate("document.querySelectorAll('#requests .row')[1].click()")
    wait_stepping(browser, busy, f"{CHART_NOW} === '256 of 256 tokens'")
    browser.screenshot(SHOTS / f"{name}.png")
    text = browser.evaluate(TEXT)
    assert "request-48" in text
    assert "Of 73 prompt tokens, 64 came from storage and 9 were computed." in text
    assert "closed: in use" in text
    assert browser.evaluate(OVERFLOW) <= 0, "no scrolling sideways"
    assert browser.evaluate(UNNAMED) == 0, "everything that can be used has a name"
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.errors == []


def test_the_title_tells_which_model_is_served_and_where(browser: Chromium) -> None:
    """The address alone leads to the page, too."""
    pages = StatusPages(Watch(full_snapshot), engine=lambda: {"model": "SmolLM2", "running": 0})
    server = StatusServer(pages, port=0)
    server.open()
    try:
        browser.open(f"{server.url}/", width=360)
        browser.wait_for(LIVE)
        name = f"SmolLM2 at {server.url.removeprefix('http://')}"
        assert browser.evaluate("document.title") == f"{name} – HiCache"
        assert browser.evaluate("document.getElementById('server').innerText") == name
        assert browser.evaluate(OVERFLOW) <= 0, "no scrolling sideways"
    finally:
        server.close()
    browser.wait_for("document.title.endsWith('– HiCache: disconnected')")


def test_the_figures_are_those_of_the_cache(browser: Chromium, busy: World) -> None:
    browser.open(url_of(busy), width=1200)
    browser.wait_for(LIVE)
    hits = busy.cache.snapshot().hit_tokens
    prompt = sum(hits.values()) + busy.cache.counters.missed_tokens
    text = browser.evaluate("document.getElementById('tiles').innerText")
    assert f"{100 * sum(hits.values()) / prompt:.1f} %" in text
    assert f"{prompt:,}" in text


def test_transfers_are_shown_where_there_are_any(
    browser: Chromium, busy: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "document.getElementById('transfers-card').hidden"
    browser.open(url_of(busy), width=360)
    browser.wait_for(LIVE)
    assert browser.evaluate(hidden)
    plain = busy.cache.snapshot
    moved = transfers()
    monkeypatch.setattr(busy.cache, "snapshot", lambda: replace(plain(), transfers=[moved]))
    browser.wait_for(f"!{hidden}")
    text = browser.evaluate("document.getElementById('transfers').innerText")
    assert moved.backend in text
    assert browser.evaluate(OVERFLOW) <= 0, "no scrolling sideways"
    assert browser.errors == []


def test_groups_of_layers_are_shown_where_there_are_any(
    browser: Chromium, busy: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "document.getElementById('groups-card').hidden"
    browser.open(url_of(busy), width=360)
    browser.wait_for(LIVE)
    assert browser.evaluate(hidden)
    plain = busy.cache.snapshot
    groups = [group(), group("mamba", 0, 1)]
    monkeypatch.setattr(busy.cache, "snapshot", lambda: replace(plain(), groups=groups))
    browser.wait_for(f"!{hidden}")
    text = browser.evaluate("document.getElementById('groups').innerText")
    for word in ("swa", "window of 4,096 tokens", "mamba", "state", "device", "host", "200"):
        assert word in text
    assert browser.evaluate(OVERFLOW) <= 0, "no scrolling sideways"
    assert browser.errors == []


def test_without_a_key_the_page_asks_for_it_and_claims_nothing(
    browser: Chromium, busy: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that refuses all data, as one with an API key does until it is given."""
    answer = http._answer
    files = {"/hicache/", "/hicache/app.js", "/hicache/page.css", "/hicache/icon.svg"}

    def refusing(pages: StatusPages, path: str, query: str) -> Answer:
        is_file = path in files or path.endswith(".js")
        return answer(pages, path, query) if is_file else Answer(401, "text/plain", b"")

    with monkeypatch.context() as patched:
        patched.setattr(http, "_answer", refusing)
        browser.open(url_of(busy), width=360)
        browser.wait_for("!document.getElementById('key').hidden")
        text = browser.evaluate(TEXT)
        assert "requires an API key" in text
        for claim in ("No requests yet", "No data yet", "No storage backend", "Prefix tree"):
            assert claim not in text
    browser.wait_for(LIVE)
    assert "request-48" in browser.evaluate(TEXT)


def test_the_keyboard_reaches_and_opens_a_request(browser: Chromium, busy: World) -> None:
    browser.open(url_of(busy), width=1200)
    browser.wait_for("document.querySelectorAll('#requests .row').length > 5")
    browser.evaluate("document.querySelector('#find button').focus()")
    browser.press("Tab")
    browser.press("Enter")
    browser.wait_for("document.querySelector('#requests .row[aria-expanded=true]') !== null")
    assert browser.evaluate("document.activeElement.classList.contains('row')")


def test_the_tree_zooms_in_and_out(browser: Chromium, busy: World) -> None:
    browser.open(url_of(busy), width=1200)
    wait_stepping(browser, busy, "document.querySelectorAll('#tree g').length > 5")
    browser.evaluate("document.querySelectorAll('#tree g')[1].focus()")
    browser.press("Enter")
    assert browser.evaluate("document.querySelectorAll('#crumbs button').length") == 3
    assert "Tokens 0 to 40" in browser.evaluate("document.getElementById('tree-says').innerText")
    browser.press("Escape")
    assert browser.evaluate("document.querySelectorAll('#crumbs button').length") == 2


def test_a_request_is_explained_by_its_id(browser: Chromium, busy: World) -> None:
    browser.open(url_of(busy), width=360)
    browser.wait_for("document.querySelectorAll('#requests .row').length > 5")
    for request_id, said in (("request-1", "were computed"), ("nobody", "No record of a request")):
        browser.evaluate(
            f"document.getElementById('find-id').value = '{request_id}';"
            "document.getElementById('find').requestSubmit()"
        )
        found = "document.getElementById('found').innerText"
        browser.wait_for(f"{found}.includes('{said}') && {found}.includes('{request_id}')")


def test_markup_in_a_request_id_stays_text(browser: Chromium, worlds: list[World]) -> None:
    world = make_world(hicache_status_port=0)
    worlds.append(world)
    world.cache.match_prefix(ids(9), request_id="<img src=x onerror=alert(1)>")
    browser.open(url_of(world), width=360)
    browser.wait_for(f"{TEXT}.includes('<img src=x')")
    assert browser.evaluate("document.querySelectorAll('#requests img').length") == 0


@pytest.mark.parametrize("width", [1200, 360])
def test_without_data_it_says_so(browser: Chromium, worlds: list[World], width: int) -> None:
    world = make_world(hicache_status_port=0)
    worlds.append(world)
    browser.open(url_of(world), width=width)
    wait_stepping(browser, world, f"{LIVE} && {TEXT}.includes('The tree is empty')")
    text = browser.evaluate(TEXT)
    assert "No data yet" in text
    assert "No requests yet" in text
    assert "No storage backend is attached" in text
    browser.screenshot(SHOTS / f"empty-{width}.png")
    assert browser.evaluate(OVERFLOW) <= 0


@pytest.mark.parametrize("width", [1200, 360])
def test_when_the_server_goes_it_says_so_and_keeps_what_it_knew(
    browser: Chromium, width: int
) -> None:
    world = busy_world()
    try:
        browser.open(url_of(world), width=width)
        browser.wait_for(LIVE)
    finally:
        world.close()
    browser.wait_for("!document.getElementById('gone').hidden")
    text = browser.evaluate(TEXT)
    assert "The server does not answer since" in text
    assert "Disconnected" in text
    assert "request-48" in text
    browser.screenshot(SHOTS / f"gone-{width}.png")
    assert browser.evaluate(OVERFLOW) <= 0
