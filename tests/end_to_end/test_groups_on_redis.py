"""Windows and states come back from a real Redis server, and are gone when it has lost them."""

from __future__ import annotations

import pytest

from tests.page_path.grouped_world import MIXES, make_grouped_world
from tests.servers.valkey import running


@pytest.mark.parametrize("mix", MIXES)
def test_units_come_back_from_redis(mix: str) -> None:
    with running() as server:
        settings = {"url": server.url}
        first = make_grouped_world(mix, backend="redis", storage=settings)
        first.request(range(40))
        assert first.cache.flush(10.0)
        second = make_grouped_world(mix, backend="redis", storage=settings)
        outcome = second.request(range(44))
        assert (outcome.n_tokens, outcome.storage) == (40, 40)
        with server.client() as client:
            client.flushall()
        third = make_grouped_world(mix, backend="redis", storage=settings)
        assert third.request(range(44)).n_tokens == 0
        for world in (first, second, third):
            world.close()
