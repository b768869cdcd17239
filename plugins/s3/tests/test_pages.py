"""What goes in comes out: packed or not, by whatever number and length of segments."""

from __future__ import annotations

import pytest
from conftest import MakeBackend
from hicache_s3 import S3Backend

from plugins.s3.tests.conftest import MakeBackend
from plugins.s3.tests.world import blank, filled, is_right, keys_of

PAGE = (64, 4032)
NBYTES = 4096


def put(backend: S3Backend, keys: list[str], shape: tuple[int, ...] = PAGE) -> None:
    assert backend.batch_set(keys, [filled(key, shape) for key in keys]) == len(keys)


def hits(backend: S3Backend, keys: list[str], shape: tuple[int, ...] = PAGE) -> int:
    pages = [blank(shape) for _ in keys]
    n_filled = backend.batch_get(keys, pages)
    assert all(is_right(key, page) for key, page in zip(keys[:n_filled], pages, strict=False))
    return n_filled


@pytest.fixture(params=[True, False], ids=["packed", "alone"])
def pack(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("shape", [(4096,), PAGE, (64, *[256] * 16), (0, 100, 0, 28, 0), (1, 2, 3)])
def test_a_batch_comes_back_whatever_its_segments(
    make_backend: MakeBackend, pack: bool, shape: tuple[int, ...]
) -> None:
    backend = make_backend(pack=pack)
    keys = keys_of(10)
    put(backend, keys, shape)
    other = make_backend(pack=pack)
    assert other.batch_exists(keys) == 10
    assert hits(other, keys, shape) == 10
    assert hits(make_backend(pack=not pack), keys, shape) == 10
    assert hits(backend, keys, shape) == 10
