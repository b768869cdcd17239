"""``hicache top``: one view into a pipe, a live one on a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from click.testing import CliRunner

from hicache_core.cli.top import command
from hicache_core.observe.history import History
from hicache_core.observe.http import StatusPages, StatusServer
from hicache_core.observe.windows import Watch, WriteOnlyAlarm
from tests.unit.observe.worlds import full_snapshot

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
    assert "nobody answers" in shown.output


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
