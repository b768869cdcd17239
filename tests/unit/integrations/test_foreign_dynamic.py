"""Pages of several lengths in classes written for SGLang's ``dynamic``, some of which know one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from hicache_core.errors import IncompatibleBackend
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.types import Page
from tests.unit.integrations.foreign_world import bytes_in, content, keys_of, page_of

CLASSES = Path(__file__).parent / "sglang_classes.py"
SIZES = [100, 4096, 5000, 4096]


def settings(cls: str, **more: object) -> dict[str, object]:
    return {"backend_name": "guest", "module_path": str(CLASSES), "class_name": cls, **more}


def pages() -> list[Page]:
    return [page_of(content(n, nbytes)) for n, nbytes in enumerate(SIZES)]


@pytest.mark.parametrize(
    ("cls", "v1", "nbytes", "fit"),
    [
        ("DuckStore", {}, 0, [True] * 4),
        ("BatchStore", {}, 0, [True] * 4),
        ("V1Store", {"interface_v1": 1}, 5000, [True] * 4),
        ("V1Store", {"interface_v1": 1}, 4096, [True, True, False, True]),
    ],
)
def test_pages_that_fit_are_stored_and_read(
    cls: str, v1: dict[str, int], nbytes: int, fit: list[bool]
) -> None:
    chosen = settings(cls, **v1)
    with closing(open_store("dynamic", chosen, object_nbytes=nbytes)) as store:
        keys = keys_of(range(4))
        assert store.write(keys, pages()).mask == fit
        into = [page_of(bytes(n)) for n in SIZES]
        assert store.read(keys, into).mask == fit
        for found, page, filled in zip(fit, pages(), into, strict=True):
            assert not found or bytes_in(filled) == bytes_in(page)


def test_slots_of_an_unknown_length_are_refused_in_one_sentence() -> None:
    with pytest.raises(IncompatibleBackend, match="slots of one size"):
        open_store("dynamic", settings("V1Store", interface_v1=1))
