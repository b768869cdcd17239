"""``hicache top``: one view into a pipe, a live one on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields

import pytest
from click.testing import CliRunner
from rich.console import Console

from hicache_core.cli import _ask
from hicache_core.cli._cache_view import Moment, top_view
from hicache_core.cli.status import command as status_command
from hicache_core.cli.top import command
from hicache_core.observe import http
from hicache_core.observe.history import History
from hicache_core.observe.http import DEFAULT_PORT, StatusPages, StatusServer
from hicache_core.observe.snapshot import PoolStatus
from hicache_core.observe.windows import Watch, WriteOnlyAlarm
from hicache_core.server.settings import ServerSettings
from tests.unit.observe.worlds import backend, full_snapshot

RECORDS = [
    {
        "request_id": f"r{n}",
        "n_tokens": 100,
        "device_tokens": 10,
        "host_tokens": 20,
        "storage_tokens": 30,
        "missed_tokens": 40 + n,
        "reason": "never_seen",
        "detail": "",
        "at_s": 1.0,
        "ttft_s": 0.1 * n,
    }
    for n in range(30)
]


@pytest.fixture
def server() -> Iterator[StatusServer]:
    watch = Watch(full_snapshot, alarm=WriteOnlyAlarm(min_questions=10**9))
    history = History(watch)
    history.sample()
    history.sample()
    pages = StatusPages(
        watch,
        history,
        requests=lambda limit: RECORDS[:limit],
        engine=lambda: {"running": 3, "waiting": 7},
    )
    made = StatusServer(pages, port=0)
    made.open()
    with closing(made):
        yield made


def test_once_prints_one_view(server: StatusServer) -> None:
    shown = CliRunner().invoke(command, [server.url, "--once"])
    assert shown.exit_code == 0, shown.output
    assert "60% of 1,600 tokens" in shown.output
    assert "3 running, 7 waiting" in shown.output
    assert "ALARM  s3: the breaker is open" in shown.output
    assert "hunter2" not in shown.output
    rows = [line.split() for line in shown.output.splitlines()]
    slowest = ["r29", "100", "10", "20", "30", "69", "2,900", "ms", "never", "seen"]
    assert slowest in rows
    assert any(row[:1] == ["tcp"] for row in rows), "transfers are shown"
    assert ["swa", "(window", "4,096)", "device", "20", "8", "10", "0", "9"] in rows
    assert ["host", "200", "80", "120", "11"] in rows, "units of the host"
    assert any(row[:2] == ["mamba", "(state)"] for row in rows)
    assert not any(row[:1] == ["r5"] for row in rows), "only the slowest are shown"


def test_a_server_with_a_status_only_is_enough() -> None:
    made = StatusServer(StatusPages(Watch(full_snapshot)), port=0)
    made.open()
    with closing(made):
        shown = CliRunner().invoke(command, [made.url + "/hicache/"])
    assert shown.exit_code == 0, shown.output
    assert "no requests yet" in shown.output


def test_nobody_there_is_one_clear_line() -> None:
    shown = CliRunner().invoke(command, ["http://127.0.0.1:1"])
    assert shown.exit_code == 1
    assert "no answer from" in shown.output


def test_on_a_terminal_it_goes_on_until_it_is_interrupted(server: StatusServer) -> None:
    ours, theirs = pty.openpty()
    code = f"from hicache_core.cli.main import main; main(['top', '{server.url}'])"
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    try:
        seen = _read_until(ours, lambda text: text.count("HiCache") >= 2)
        assert "storage" in seen
        process.send_signal(signal.SIGINT)
        _read_until(ours, lambda _: process.poll() is not None)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(terminal: int, is_done: object) -> str:
    assert callable(is_done)
    text, end = "", time.monotonic() + 60
    while not is_done(text):
        assert time.monotonic() < end, text
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                return text
    return text


def test_no_number_is_cut_in_a_window_of_80_columns() -> None:
    large = PoolStatus(1_000_000, 123_456, 1, 1, 1)
    snapshot = full_snapshot(
        device=large,
        host=large,
        hit_tokens=dict.fromkeys(("device", "host", "storage"), 123_456_789),
        backends=(backend("a-store-with-a-long-name", stored_nbytes=1 << 43, retries=10**6),),
        transfers=(),
    )
    counts = dict.fromkeys(("n", "device", "host", "storage", "missed"), 128_000)
    request = {
        **{f"{name}_tokens": n for name, n in counts.items()},
        "request_id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "reason": "other_namespace",
        "ttft_s": 12.345,
    }
    seen = Watch(lambda: snapshot).observe()
    moment = Moment("http://127.0.0.1:30000", seen, None, [request], {}, 0)
    out = Console(width=80, markup=False, highlight=False, file=io.StringIO(), color_system=None)
    out.print(top_view(moment))
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    lines = [line.split() for line in text.splitlines()]
    (row,) = [line for line in lines if line[:1] and line[0].startswith("chat")]
    assert row.count("128,000") == 5
    assert "12,345" in row
    assert "TiB" in text
    for tier in ("device", "host", "storage"):
        (line,) = [line for line in text.splitlines() if re.match(f"{tier} .*hit tokens", line)]
        assert "123,456,789 hit tokens" in line
    assert "88% of 16,000,000 tokens" in text


def test_without_a_url_the_usual_places_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made = StatusServer(StatusPages(Watch(full_snapshot)), port=0)
    made.open()
    with closing(made):
        monkeypatch.setattr(_ask, "DEFAULT_URLS", ("http://127.0.0.1:1", made.url))
        for one in (command, status_command):
            shown = CliRunner().invoke(one, [])
            assert shown.exit_code == 0, shown.output
    monkeypatch.setattr(_ask, "DEFAULT_URLS", ("http://127.0.0.1:1",))
    shown = CliRunner().invoke(status_command, [])
    assert shown.exit_code == 1
    assert "nothing listens at http://127.0.0.1:1; give the URL" in shown.output


def test_the_first_usual_place_is_that_of_the_server() -> None:
    (port,) = [field.default for field in fields(ServerSettings) if field.name == "port"]
    usual = (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{DEFAULT_PORT}")
    assert usual == _ask.DEFAULT_URLS


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_key_is_given_to_the_server_that_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    asked: list[str | None] = []
    answered = http._Handler.do_GET

    def guarded(handler: http._Handler) -> None:
        asked.append(handler.headers.get("Authorization"))
        if asked[-1] == "Bearer right":
            answered(handler)
        else:
            handler.send_error(401)

    monkeypatch.setattr(http._Handler, "do_GET", guarded)
    made = StatusServer(StatusPages(Watch(full_snapshot)), port=0)
    made.open()
    environment = {"HICACHE_API_KEY": "right"} if by_environment else {}
    given = [] if by_environment else ["--api-key", "right"]
    with closing(made):
        for one in (command, status_command):
            shown = CliRunner().invoke(one, [made.url, *given], env=environment)
            assert shown.exit_code == 0, shown.output
            assert "it needs --api-key" in CliRunner().invoke(one, [made.url]).output
            wrong = CliRunner().invoke(one, [made.url, "--api-key", "wrong"])
            assert "it refuses this API key" in wrong.output
            assert "wrong" not in wrong.output
