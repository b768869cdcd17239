"""What a page takes of a server's memory is what ``taken_nbytes`` says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hicache_redis import RedisBackend
from hicache_redis.memory import size_class

from hicache_core.storage.sealed import HEADER_NBYTES
from tests.servers.valkey import REDIS, running

KEY_NBYTES = 512
"""More than a key and its entry in the table take."""


def test_a_doubling_has_four_sizes() -> None:
    sizes = [size_class(n) for n in (1, 16, 17, 128, 129, 160, 161, 256, 257, 1024, 1025, 2**20)]
    assert sizes == [16, 16, 32, 128, 160, 160, 192, 256, 320, 1024, 1280, 2**20]
    found = {size_class(n) for n in range(2**14 + 1, 2**15 + 1)}
    assert sorted(found) == [20 << 10, 24 << 10, 28 << 10, 32 << 10]


@pytest.mark.skipif(REDIS is None, reason="needs a redis-server, which has jemalloc, in PATH")
def test_a_page_of_a_power_of_two_takes_a_quarter_more() -> None:
    assert REDIS is not None
    with running(binary=REDIS) as server:
        if "jemalloc" not in server.client().info("memory")["mem_allocator"]:
            pytest.skip("this redis-server was built without jemalloc")
        payloads = [2**16, 2**20, 2**22, 2**23, 3 * 2**20, 7 * 2**19, 5 * 2**18, 100_000]
        for payload_nbytes in payloads:
            nbytes = HEADER_NBYTES + payload_nbytes
            server.client().set("page", bytes(nbytes))
            taken = server.call("MEMORY", "USAGE", "page")
            assert isinstance(taken, int)
            expected = RedisBackend.taken_nbytes(nbytes)
            assert 0 <= taken - expected < KEY_NBYTES, f"{nbytes} bytes"
            if payload_nbytes & (payload_nbytes - 1) == 0:
                assert expected == payload_nbytes * 5 // 4


@pytest.mark.skipif(REDIS is None, reason="needs a redis-server, which has jemalloc, in PATH")
def test_the_doctor_measures_what_an_object_takes(opened: Callable[..., RedisBackend]) -> None:
    assert REDIS is not None
    with running("--maxmemory", "64mb", binary=REDIS) as server:
        if "jemalloc" not in server.client().info("memory")["mem_allocator"]:
            pytest.skip("this redis-server was built without jemalloc")
        (found,) = (f for f in opened(url=server.url).diagnose() if f.topic == "overhead")
        assert found.level == "ok"
        assert "takes 1.25 times its bytes" in found.message
        assert server.client().dbsize() == 0
