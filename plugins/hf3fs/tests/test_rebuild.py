"""Metadata that is lost is rebuilt from the slots' headers; what was not whole stays out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hicache_hf3fs.metadata import Wanted, Written

from hicache_core.errors import BackendCorrupt, BackendUnavailable
from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import content, hits, key_of, put
from tests.servers.valkey import Valkey


def lose(directory: Path) -> None:
    """Removes the SQLite index as somebody might."""
    for path in directory.glob("kv.index.sqlite*"):
        path.unlink()


def test_a_lost_sqlite_index_is_rebuilt(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = opened()
    put(backend, range(10))
    backend.close()
    lose(tmp_path)
    with caplog.at_level(logging.WARNING):
        backend = opened()
    assert "rebuilt from its headers" in caplog.text
    assert hits(backend, range(10)) == 10
    backend.check_integrity()
    assert put(backend, range(10, 40)) == 30
    assert hits(backend, range(40)) == 40


def test_a_damaged_sqlite_index_is_set_aside_and_rebuilt(opened: Open, tmp_path: Path) -> None:
    backend = opened()
    put(backend, range(10))
    backend.close()
    index = tmp_path / "kv.index.sqlite"
    index.write_bytes(b"no database" * 1000)
    assert hits(opened(), range(10)) == 10
    assert index.with_name("kv.index.sqlite.damaged").exists()


def test_a_new_index_is_never_made_while_others_use_the_old(opened: Open, tmp_path: Path) -> None:
    """Two indexes would give one slot to two writers."""
    backend = opened()
    put(backend, ["a"])
    (tmp_path / "kv.index.sqlite").unlink()
    with pytest.raises(BackendCorrupt, match="others use it"):
        opened(metadata_timeout_s=0.2)
    with pytest.raises(BackendUnavailable, match="removed or replaced while in use"):
        put(backend, ["b"])
    put(backend, ["b"])
    assert hits(opened(), ["a", "b"]) == 2


def test_a_redis_that_forgot_everything_is_told_again_by_the_next_write(
    opened: Open, own_valkey: Valkey
) -> None:
    backend = opened(metadata_url=own_valkey.url)
    put(backend, range(10))
    with own_valkey.client() as client:
        client.flushall()
    assert hits(backend, range(10)) == 0
    assert put(backend, ["new"]) == 1
    assert hits(backend, [*range(10), "new"]) == 11
    backend.check_integrity()


def test_deleted_objects_do_not_come_back(opened: Open, tmp_path: Path) -> None:
    backend = opened()
    put(backend, range(4))
    backend.delete([key_of(1), key_of(2)])
    backend.close()
    lose(tmp_path)
    backend = opened()
    assert [hits(backend, [n]) for n in range(4)] == [1, 0, 0, 1]


def test_what_was_cut_while_it_was_written_is_not_found(opened: Open, tmp_path: Path) -> None:
    """A header without its footer, a footer without its header, and a header that was damaged."""
    backend = opened()
    put(backend, range(4), 2000)
    with backend._calls.call() as store:
        places = [
            b.slot.number * 4096 for b in store.metadata.lookup(list(map(key_of, range(4)))) if b
        ]
        fd = store.own.fd
        os.pwrite(fd, bytes(16), places[0] + 256 + 2000)
        os.pwrite(fd, bytes(256), places[1])
        os.pwrite(fd, b"\xff", places[2] + 30)
    backend.close()
    lose(tmp_path)
    backend = opened()
    assert [hits(backend, [n], 2000) for n in range(4)] == [0, 0, 0, 1]
    backend.check_integrity()


def test_a_writer_from_before_the_loss_cannot_publish(opened: Open, own_valkey: Valkey) -> None:
    backend = opened(metadata_url=own_valkey.url)
    with backend._calls.call() as store:
        (slot,) = store.metadata.reserve(store.own.name, [Wanted(key_of("late"), 1000)])
        with own_valkey.client() as client:
            client.flushall()
        put(backend, range(8))
        assert slot is not None
        assert store.metadata.publish([Written(key_of("late"), 1000, slot)]) == [False]
    assert backend.get(key_of(0)) == content(key_of(0), 1000)
