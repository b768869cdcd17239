"""SGLang over our stores: two engines of a kind, to which one store after another is attached."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.child import Child
from tests.engines.environments import SGLANG, running
from tests.engines.models import prompt
from tests.engines.scene import PROMPTS, ask, stored_by, tokens, wait_until, whole
from tests.engines.stores import HAZARDS, Store, running_store

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

PAGE_SIZE = 64
CACHED = whole(PAGE_SIZE)
BOUND_S = 60.0
"""No request takes longer while a store is lost; the tiny model itself needs a second."""

ROWS = {"hicache_mem_layout": "page_first"}
DIRECT = {"hicache_mem_layout": "page_first_direct", "hicache_io_backend": "direct"}
LAYERS = {"hicache_mem_layout": "layer_first"}


@dataclass(frozen=True)
class Kind:
    """A way through SGLang: its version, the layout of its host pool, and which of our calls."""

    version: str
    layout: dict[str, str]
    interface_v1: int

    def attach(self, engine: Child, store: Store) -> None:
        """Attaches the store to an engine."""
        config = {
            "backend_name": "hicache",
            "module_path": "hicache_core.integrations.sglang",
            "class_name": "HiCacheBackend",
            "interface_v1": self.interface_v1,
            **store.named,
        }
        done, message = engine.ask("attach", backend="dynamic", config=config)
        assert done, message


KINDS = {
    "page_first": Kind(SGLANG[0], ROWS, 1),
    "page_first_direct": Kind(SGLANG[0], DIRECT, 1),
    "layer_first": Kind(SGLANG[0], LAYERS, 1),
    "generic": Kind(SGLANG[0], ROWS, 0),
    "page_first-0.5.22": Kind(SGLANG[1], ROWS, 1),
}


class Pair:
    """Two engines of one kind.

    Attributes:
        kind: of both.
        first, second: the engines.
        expected: what both answer to ``PROMPTS`` when nothing is cached.
    """

    def __init__(self, kind: Kind, first: Child, second: Child) -> None:
        self.kind = kind
        self.first, self.second = first, second
        answers = ask(first)
        assert [answer["cached"] for answer in answers] == [0, 0]
        self.expected = tokens(answers)

    @contextlib.contextmanager
    def on(self, store: Store) -> Iterator[None]:
        """Both engines on a store that the first has filled; the second knows nothing of it."""
        with self._attached(self.first, store):
            stored_by(self.first, self.expected, CACHED, "from_storage")
        with self._attached(self.second, store):
            yield

    @contextlib.contextmanager
    def _attached(self, engine: Child, store: Store) -> Iterator[None]:
        forget(engine)
        self.kind.attach(engine, store)
        try:
            yield
        finally:
            wait_until(lambda: engine.ask("detach")[0], "the store is detached")

    def right(self) -> list[int]:
        """Asks the second engine, whose tokens must be right; how many came from the store."""
        answers = ask(self.second)
        assert tokens(answers) == self.expected
        assert max(answer["seconds"] for answer in answers) < BOUND_S
        return [answer["from_storage"] for answer in answers]


def forget(engine: Child) -> None:
    """Empties the tiers of device and host, once the engine is idle."""
    wait_until(lambda: bool(engine.ask("forget")), "the engine is idle")


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Two engines of the kind that the test names."""
    kind = KINDS[request.param]
    options = {"model_path": str(model), **kind.layout}
    folder = tmp_path_factory.mktemp("sglang")
    with running(kind.version, folder, options, options) as engines:
        yield Pair(kind, *engines)


@pytest.mark.parametrize("pair", KINDS, indirect=True)
@pytest.mark.parametrize("backend", ["file", "redis"])
def test_what_one_process_stores_another_hits(pair: Pair, backend: str, tmp_path: Path) -> None:
    with running_store(backend, tmp_path / "store") as store, pair.on(store):
        assert pair.right() == [CACHED, CACHED]


@pytest.mark.parametrize("pair", ["page_first"], indirect=True)
@pytest.mark.parametrize("backend", ["s3", "mooncake", "hf3fs"])
def test_the_other_backends_are_hit_as_well(pair: Pair, backend: str, tmp_path: Path) -> None:
    with running_store(backend, tmp_path / "store") as store, pair.on(store):
        assert pair.right() == [CACHED, CACHED]


@pytest.mark.parametrize("pair", KINDS, indirect=True)
@pytest.mark.parametrize("backend", ["file", "redis"])
def test_a_damaged_page_is_refused_and_computed_again(
    pair: Pair, backend: str, tmp_path: Path
) -> None:
    with running_store(backend, tmp_path / "store") as store, pair.on(store):
        pages = store.pages()
        assert len(pages) == len(PROMPTS) * CACHED // PAGE_SIZE
        store.damage(pages[0])
        one_short = pair.right()
        assert sum(one_short) < len(PROMPTS) * CACHED
        assert max(one_short) == CACHED
        for page in store.pages():
            store.damage(page)
        forget(pair.second)
        assert pair.right() == [0, 0]


@pytest.mark.parametrize("pair", KINDS, indirect=True)
@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("when", ["between", "within"])
def test_a_store_that_is_lost_costs_hits_and_nothing_else(
    pair: Pair, hazard: str, when: str, tmp_path: Path
) -> None:
    with running_store("redis", tmp_path / "store") as store:
        assert store.server is not None
        with pair.on(store):
            lose = getattr(store.server, hazard)
            if when == "between":
                lose()
                assert pair.right() == [0, 0]
            else:
                losing = threading.Timer(0.05, lose)
                losing.start()
                pair.right()
                losing.join()
            forget(pair.second)
            assert pair.right() == [0, 0]
            if hazard == "freeze":
                store.server.thaw()


@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_an_engine_killed_while_it_stores_leaves_only_right_pages(
    pair: Pair, tmp_path: Path
) -> None:
    prompts = [
        prompt(kind) for kind in range(2, 8)
    ]  # the first engine ends here: this test is last

    def answers(engine: Child) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = engine.ask("generate", prompts=prompts, n_new=4)
        return found

    forget(pair.second)
    expected = tokens(answers(pair.second))
    forget(pair.second)
    with running_store("file", tmp_path / "store") as store:
        pair.kind.attach(pair.first, store)
        pair.first.send("generate", prompts=prompts, n_new=4)
        wait_until(lambda: bool(store.pages()), "the first page is stored")
        pair.first.kill()
        pair.kind.attach(pair.second, store)
        found = answers(pair.second)
        assert tokens(found) == expected
        assert sum(answer["from_storage"] for answer in found) > 0
