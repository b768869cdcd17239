"""The status server and ``hicache status``, which asks it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote, urlsplit

import pytest
from click.testing import CliRunner, Result

from hicache_core.cli import status as status_command
from hicache_core.errors import ConfigError
from hicache_core.observe.http import StatusPages, StatusServer
from hicache_core.observe.metrics import CacheCollector, exposition
from hicache_core.observe.snapshot import CacheSnapshot, EventsStatus, PoolStatus
from hicache_core.observe.windows import Watch, WriteOnlyAlarm
from tests.scarce import no_file_descriptors
from tests.unit.observe.worlds import full_snapshot

RECORDS = {"r/1 ä": {"runs": [{"tier": "storage", "why": "evicted"}]}}
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server for a snapshot; its URL."""
    servers: list[StatusServer] = []

    def start(snapshot: CacheSnapshot | None = None, **pages: object) -> str:
        watch = Watch(lambda: snapshot or full_snapshot(), alarm=WriteOnlyAlarm(min_questions=0))
        server = StatusServer(StatusPages(watch, **pages), port=0)  # type: ignore[arg-type]
        servers.append(server)
        server.open()
        return server.url

    yield start
    for server in servers:
        server.close()


def get(url: str, path: str) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, response.headers, body


def status(*arguments: str) -> Result:
    return CliRunner().invoke(status_command.command, arguments)


# The server.


def test_it_goes_on_after_a_moment_without_file_descriptors(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    url = serve()
    address = urlsplit(url)
    clients = [socket.socket() for _ in range(2)]
    with no_file_descriptors():
        for client in clients:
            client.connect((address.hostname, address.port))
        time.sleep(0.5)
    for client in clients:
        client.close()
    assert get(url, "/health")[0] == 200
    assert [record.message for record in caplog.records].count(caplog.messages[0]) == 1
    assert "cannot answer now; it will try again" in caplog.messages[0]


def test_the_address_alone_leads_to_the_page(serve: Serve) -> None:
    status, headers, _ = get(serve(), "/")
    assert (status, headers["Location"]) == (307, "hicache/")


def test_a_thread_that_does_not_start_costs_its_request_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Thread.start`` fails as it does without threads; the limit does not bind the superuser."""

    def cannot(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    url = serve()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", cannot)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            get(url, "/health")
    assert get(url, "/health")[0] == 200


def test_it_answers_the_status_as_json(serve: Serve) -> None:
    code, headers, body = get(serve(), "/hicache/status")
    assert (code, headers["Content-Type"]) == (200, "application/json")
    answer = json.loads(body)
    assert answer["snapshot"]["hit_tokens"] == {"device": 100, "host": 50, "storage": 25}
    assert answer["snapshot"]["backends"][1]["breaker"] == "open"
    assert '"***"' not in body, "no number is mistaken for a secret"


def test_it_answers_metrics_as_prometheus_reads_them(serve: Serve) -> None:
    collector = CacheCollector(Watch(full_snapshot))
    code, headers, body = get(serve(metrics=lambda: exposition(collector)), "/metrics")
    assert (code, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'hicache:cached_tokens_total{cache_source="device"} 100.0' in body


def test_without_prometheus_client_it_says_what_to_install(serve: Serve) -> None:
    code, _, body = get(serve(), "/metrics")
    assert code == 404
    assert "hicache-core[metrics]" in json.loads(body)["error"]


def test_it_answers_why_a_request_missed(serve: Serve) -> None:
    asked: list[str] = []

    def explain(request_id: str) -> Mapping[str, object] | None:
        asked.append(request_id)
        return RECORDS.get(request_id)

    url = serve(explain=explain)
    code, _, body = get(url, f"/hicache/explain/{quote('r/1 ä')}")
    assert (code, json.loads(body)) == (200, RECORDS["r/1 ä"])
    code, _, body = get(url, "/hicache/explain/unknown")
    assert code == 404
    assert "'unknown'" in json.loads(body)["error"]
    assert asked == ["r/1 ä", "unknown"]


def test_health_is_answered_without_a_look_at_the_cache(serve: Serve) -> None:
    assert get(serve(), "/health")[::2] == (200, '{"status": "ok"}')


def test_another_path_is_told_what_there_is(serve: Serve) -> None:
    code, _, body = get(serve(), "/elsewhere")
    assert code == 404
    assert "/hicache/status" in body


def test_the_root_leads_to_the_page(serve: Serve) -> None:
    code, headers, _ = get(serve(), "/")
    assert (code, headers["Location"]) == (307, "hicache/")  # relative: a proxy may add a path


def test_no_secret_is_answered(serve: Serve) -> None:
    record = {"backend": "redis://user:hunter2@host:6379", "password": "hunter2"}
    _, _, body = get(serve(explain=lambda _: record), "/hicache/explain/r")
    assert "hunter2" not in body
    assert "host:6379" in body


def test_it_listens_on_loopback_unless_told_otherwise(serve: Serve) -> None:
    assert urlsplit(serve()).hostname == "127.0.0.1"


def test_a_failing_look_is_logged_and_the_server_goes_on(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request_id: str) -> Mapping[str, object]:
        raise RuntimeError("a bug of ours")

    url = serve(explain=broken)
    with pytest.raises(http.client.RemoteDisconnected):
        get(url, "/hicache/explain/r")
    assert get(url, "/health")[0] == 200
    assert "could not answer" in caplog.text


def test_an_address_that_is_taken_is_a_clear_error(serve: Serve) -> None:
    port = urlsplit(serve()).port
    assert port is not None
    second = StatusServer(StatusPages(Watch(full_snapshot)), port=port)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        second.open()
    second.close()


def test_close_ends_every_thread_even_with_clients_that_say_nothing() -> None:
    before = set(threading.enumerate())
    server = StatusServer(StatusPages(Watch(full_snapshot)), port=0)
    server.open()
    address = urlsplit(server.url)
    mute = socket.create_connection((address.hostname, address.port))
    mute.sendall(b"GET /hea")
    while len(set(threading.enumerate()) - before) < 2:
        assert get(server.url, "/health")[0] == 200
    server.close()
    server.close()
    assert set(threading.enumerate()) == before
    assert mute.recv(100) == b""
    mute.close()


# The command.


def test_status_shows_tiers_storage_queues_and_alarms(serve: Serve) -> None:
    shown = status(serve())
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.output.splitlines()]
    assert ["device", "100", "40", "30", "20", "10", "100", "11"] in rows
    assert ["host", "1,000", "400", "300", "200", "100", "50", "1"] in rows
    assert ["s3", "open", "6.8", "KiB", "7.8", "KiB", "4", "4", "11"] in rows
    assert ["redis", "get", "2", "≤", "100", "ms", "≤", "1000", "ms", "BackendTimeout", "3"] in rows
    (moved,) = [line for line in shown.output.splitlines() if line.startswith(" tcp ")]
    assert "2.0 KiB" in moved
    assert "sent 2, arrived 1, failed 1" in moved
    assert "queued: exists 1, read 2, write 3" in shown.output
    assert "jobs in flight: storage 6, copy 4" in shown.output
    assert "ALARM  s3: the breaker is open for 12 s, next probe in 4.5 s: Backend" in shown.output
    assert "hunter2" not in shown.output
    assert "ALARM  refused objects in storage: corrupt 2, foreign 1" in shown.output
    assert "ALARM  2 host pages are held by stuck storage jobs" in shown.output
    assert "no alarms" not in shown.output


def test_status_of_a_cache_without_storage_is_short(serve: Serve) -> None:
    bare = CacheSnapshot(16, 1 << 20, device=PoolStatus(8, 8, 0, 0, 0))
    shown = status(serve(bare))
    assert shown.exit_code == 0, shown.output
    assert "device" in shown.output
    assert "no tokens yet" in shown.output
    assert "storage" not in shown.output
    assert "no alarms" in shown.output


def test_dropped_events_are_an_alarm(serve: Serve) -> None:
    shown = status(serve(full_snapshot(events=EventsStatus(5, 17, 0))))
    assert "ALARM  17 KV events were dropped" in shown.output


def test_status_as_json_is_what_the_server_says(serve: Serve) -> None:
    url = serve()
    shown = status(url, "--json")
    assert (
        json.loads(shown.output)["snapshot"]
        == json.loads(get(url, "/hicache/status")[2])["snapshot"]
    )


@pytest.mark.parametrize("form", ["{netloc}", "http://{netloc}/", "http://{netloc}/hicache/status"])
def test_the_address_may_be_given_in_any_form(serve: Serve, form: str) -> None:
    shown = status(form.format(netloc=urlsplit(serve()).netloc), "--json")
    assert shown.exit_code == 0, shown.output


def test_watch_repeats_until_it_is_interrupted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status_command.time, "sleep", pause)
    shown = status(serve(), "--watch", "2.5", "--json")
    assert pauses == [2.5] * 3
    assert len([line for line in shown.output.splitlines() if line.startswith("{")]) == 3


def test_when_nobody_answers_it_says_so() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        shown = status(f"http://user:hunter2@127.0.0.1:{port}")
    assert shown.exit_code == 1
    assert "no answer from http://***@127.0.0.1" in shown.output
    assert "hunter2" not in shown.output


def test_a_server_of_something_else_is_told_apart(serve: Serve) -> None:
    shown = status(serve() + "/elsewhere")
    assert shown.exit_code == 1
    assert "answers 404" in shown.output


def test_a_status_of_another_version_is_a_clear_error(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_command, "ask", lambda *_, **__: {"snapshot": {}})
    shown = status("http://127.0.0.1:1")
    assert shown.exit_code == 1
    assert "another version" in shown.output
