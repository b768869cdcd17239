"""The page's data: history, values on demand, and the answers of both servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient

from hicache_core.controller.explain import Reason
from hicache_core.observe.history import History
from hicache_core.observe.on_demand import Aged, OnDemand
from hicache_core.observe.page.answers import PageData, page_answer
from hicache_core.observe.snapshot import CacheSnapshot, OperationStatus
from hicache_core.observe.windows import Watch
from hicache_core.radix.picture import TreePicture
from hicache_core.server.page_routes import page_router
from tests.unit.observe.worlds import backend, full_snapshot, histogram

RECORDS = [{"request_id": f"r{n}", "reason": "none"} for n in range(300)]
PATHS = ["status", "history", "requests", "tree", "engine", "explain/r1"]


def history_of(snapshot: Callable[[], CacheSnapshot] = full_snapshot, **settings: int) -> History:
    return History(Watch(snapshot), **settings)  # type: ignore[arg-type]


def page_data() -> PageData:
    history = history_of()
    history.sample()
    return PageData(
        Watch(full_snapshot),
        history,
        {record["request_id"]: record for record in RECORDS}.get,
        lambda limit: RECORDS[:limit],
        lambda: Aged(TreePicture((), 0, False), 0.5),
        lambda: {"running": 1},
    )


# History.


def test_the_history_keeps_the_newest_samples_only() -> None:
    history = history_of(max_samples=3)
    for _ in range(5):
        history.sample()
    assert [sample.n for sample in history.since(0)] == [3, 4, 5]
    assert [sample.n for sample in history.since(4)] == [5]


def test_operations_are_those_since_the_sample_before() -> None:
    latencies = [[0.05], [0.05, 0.5, 0.5], [0.05, 0.5, 0.5], [0.002]]

    def snapshot() -> CacheSnapshot:
        calls = OperationStatus("get", histogram(*latencies[0]))
        return full_snapshot(backends=[backend(operations=[calls])])

    history = history_of(snapshot)
    for _ in range(4):
        history.sample()
        latencies.pop(0)
    seen = [sample.operations[0] for sample in history.since(0)]
    assert [one.n for one in seen] == [1, 2, 0, 1], "a store that was opened anew counts from 0"
    assert [one.p99_s for one in seen] == [0.1, 1.0, None, 0.01]


def test_an_open_history_samples_by_itself_and_ends_with_close() -> None:
    seen = threading.Event()

    def snapshot() -> CacheSnapshot:
        seen.set()
        return full_snapshot()

    history = history_of(snapshot)
    history.open()
    assert seen.wait(20)
    history.close()
    history.close()
    assert not [t for t in threading.enumerate() if t.name == "hicache-history"]


# On demand.


def test_nothing_is_made_while_nobody_asks() -> None:
    on_demand: OnDemand[int] = OnDemand(clock=lambda: 0.0)
    on_demand.serve(lambda: pytest.fail("nobody asked"))
    assert on_demand.ask(0.0) is None
    on_demand.serve(lambda: 7)
    assert on_demand.ask(0.0) == Aged(7, 0.0)


def test_what_is_fresh_is_not_made_again_and_a_wish_ends() -> None:
    now = [0.0]
    made: list[float] = []
    on_demand: OnDemand[float] = OnDemand(min_age_s=1.0, wish_s=10.0, clock=lambda: now[0])

    def make() -> float:
        made.append(now[0])
        return now[0]

    on_demand.ask(0.0)
    for now[0] in (1.0, 1.5, 2.5, 9.0, 10.5, 11.0):
        on_demand.serve(make)
    assert made == [1.0, 2.5, 9.0]
    answer = on_demand.ask(0.0)
    assert answer == Aged(9.0, 2.0)


def test_who_asks_waits_for_the_owner() -> None:
    on_demand: OnDemand[str] = OnDemand()
    answers: list[Aged[str] | None] = []
    asker = threading.Thread(target=lambda: answers.append(on_demand.ask(60.0)))
    asker.start()
    while asker.is_alive():
        on_demand.serve(lambda: "made by the owner")
    asker.join()
    assert answers[0] is not None
    assert answers[0].value == "made by the owner"


# The answers.


def test_the_answers_are_bounded_and_deaf_to_nonsense() -> None:
    data = page_data()

    def requests(query: str) -> int:
        answer = page_answer(data, "/hicache/requests", query)
        assert answer is not None
        return len(json.loads(answer.body)["requests"])

    assert requests("") == 50
    assert requests("limit=7") == 7
    assert requests("limit=1000000") == 200
    assert requests("limit=-1") == requests("limit=%C2%B2") == requests("limit=9" * 40) == 50


@pytest.mark.parametrize("name", ["../answers.py", "..%2fanswers.py", "nothing.js", "%2e%2e/x"])
def test_no_other_file_is_given_out(name: str) -> None:
    assert page_answer(page_data(), f"/hicache/{name}") is None


def test_a_server_with_a_watch_alone_says_what_it_has_not() -> None:
    data = PageData(Watch(full_snapshot))
    for path in ("history", "requests", "tree"):
        answer = page_answer(data, f"/hicache/{path}")
        assert answer is not None
        assert answer.status == 404


def test_the_page_has_words_for_every_reason() -> None:
    words = page_answer(page_data(), "/hicache/words.js")
    assert words is not None
    for reason in Reason:
        assert f"\n  {reason.value}: [" in words.body.decode(), reason


# FastAPI.


def test_fastapi_answers_as_the_status_server_does() -> None:
    data = page_data()
    app = FastAPI()
    app.include_router(page_router(data))
    client = TestClient(app)
    for path in [*PATHS, "", "app.js", "page.css", "icon.svg"]:
        own = page_answer(data, f"/hicache/{path}")
        theirs = client.get(f"/hicache/{path}")
        assert own is not None
        assert (theirs.status_code, theirs.headers["content-type"]) == (
            own.status,
            own.content_type,
        )
        assert theirs.headers["content-security-policy"].startswith("default-src 'self'")
        if path != "status":
            assert theirs.content == own.body, path
    assert client.get("/hicache/nothing.js").status_code == 404
    assert str(client.get("/hicache").url).endswith("/hicache/")


def test_a_key_is_asked_for_data_and_not_for_the_page_itself() -> None:
    def refuse() -> None:
        raise HTTPException(401)

    app = FastAPI()
    app.include_router(page_router(page_data(), dependencies=[Depends(refuse)]))
    client = TestClient(app)
    assert [client.get(f"/hicache/{path}").status_code for path in PATHS] == [401] * len(PATHS)
    assert client.get("/hicache/").status_code == 200
