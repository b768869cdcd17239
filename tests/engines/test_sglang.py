"""SGLang over our stores: two engines of a kind, to which one store after another is attached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines import options, trials
from tests.engines.environments import SGLANG, running
from tests.engines.scene import Engine, wait_until
from tests.engines.stores import HAZARDS, Store, running_store
from tests.engines.trials import Pair

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

PAGE_SIZE = 64

ROWS = {"hicache_mem_layout": "page_first"}
DIRECT = {"hicache_mem_layout": "page_first_direct", "hicache_io_backend": "direct"}
LAYERS = {"hicache_mem_layout": "layer_first"}


@dataclass(frozen=True)
class Kind:
    """A way through SGLang.

    Attributes:
        version: of SGLang.
        layout: options for the layout of its host pool.
        interface_v1: 1 for its calls that name host memory, 0 for those that carry tensors.
    """

    version: str
    layout: dict[str, str]
    interface_v1: int


KINDS = {
    "page_first": Kind(SGLANG[0], ROWS, 1),
    "page_first_direct": Kind(SGLANG[0], DIRECT, 1),
    "layer_first": Kind(SGLANG[0], LAYERS, 1),
    "generic": Kind(SGLANG[0], ROWS, 0),
    "page_first-0.5.22": Kind(SGLANG[1], ROWS, 1),
}


@dataclass(frozen=True)
class Unattached:
    """A pair without a store."""

    pair: Pair
    interface_v1: int

    @contextlib.contextmanager
    def on(self, store: Store) -> Iterator[Pair]:
        """The pair on a store that the first engine has filled."""
        with self.attached(self.pair.first, store):
            self.pair.first.store_all(self.pair.expected)
        with self.attached(self.pair.second, store):
            yield self.pair

    @contextlib.contextmanager
    def attached(self, engine: Engine, store: Store) -> Iterator[None]:
        """One engine on a store."""
        engine.forget()
        config = {
            "backend_name": "hicache",
            "module_path": "hicache_core.integrations.sglang",
            "class_name": "HiCacheBackend",
            "interface_v1": self.interface_v1,
            **store.named,
        }
        done, message = engine.child.ask("attach", backend="dynamic", config=config)
        assert done, message
        yield
        wait_until(lambda: engine.child.ask("detach")[0], "the store is detached")


@pytest.fixture(scope="module")
def unattached(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Unattached]:
    """A pair of the kind that the test names."""
    kind = KINDS[request.param]
    arguments = options.sglang(model, **kind.layout)
    folder = tmp_path_factory.mktemp("sglang")
    with running(kind.version, folder, arguments, arguments) as children:
        first, second = (Engine(child, PAGE_SIZE, "from_storage") for child in children)
        yield Unattached(Pair(first, second, first.alone()), kind.interface_v1)


every_kind = pytest.mark.parametrize("unattached", KINDS, indirect=True)


@every_kind
@pytest.mark.parametrize("backend", ["file", "redis"])
def test_what_one_process_stores_another_hits(
    unattached: Unattached, backend: str, tmp_path: Path
) -> None:
    with running_store(backend, tmp_path / "store") as store, unattached.on(store) as pair:
        trials.hits(pair)


@pytest.mark.parametrize("unattached", ["page_first"], indirect=True)
@pytest.mark.parametrize("backend", ["s3", "mooncake", "hf3fs"])
def test_the_other_backends_are_hit_as_well(
    unattached: Unattached, backend: str, tmp_path: Path
) -> None:
    with running_store(backend, tmp_path / "store") as store, unattached.on(store) as pair:
        trials.hits(pair)


@every_kind
@pytest.mark.parametrize("backend", ["file", "redis"])
def test_a_damaged_page_is_refused_and_computed_again(
    unattached: Unattached, backend: str, tmp_path: Path
) -> None:
    with running_store(backend, tmp_path / "store") as store, unattached.on(store) as pair:
        trials.damage(pair, store)


@every_kind
@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("when", ["between", "within"])
def test_a_store_that_is_lost_costs_hits_and_nothing_else(
    unattached: Unattached, hazard: str, when: str, tmp_path: Path
) -> None:
    with running_store("redis", tmp_path / "store") as store, unattached.on(store) as pair:
        trials.lose(pair, store, hazard, within=when == "within")


@every_kind
def test_an_engine_killed_while_it_stores_leaves_only_right_pages(
    unattached: Unattached, tmp_path: Path
) -> None:  # the first engine ends here, so this test is the last of its kind
    pair = unattached.pair
    with running_store("file", tmp_path / "store") as store:
        attached = unattached.attached(pair.first, store)
        attached.__enter__()  # and never left: the engine is killed
        with unattached.attached(pair.second, store):
            trials.kill_the_first(pair, store)
