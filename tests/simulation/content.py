"""What a page must hold: a function of the whole prefix that it ends, and of its shard."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import ClassVar, TypeAlias

from hicache_core.pools.device import DevicePool

_MAX_KNOWN = 100_000

TOKEN_NBYTES = 4

_Key: TypeAlias = tuple[bytes, bytes, int, int, str, tuple[int, ...]]


class Contents:
    """Writes and checks the pages of one device pool."""

    _known: ClassVar[dict[_Key, list[list[bytes]]]] = {}

    def __init__(
        self, pool: DevicePool, shard: int, group: str = "", page_size: int | None = None
    ) -> None:
        """Views ``pool`` as bytes.

        Args:
            pool: of full pages, or of units of a group.
            shard: the part of the KV that the rank holds.
            group: name of the group; empty for full pages.
            page_size: tokens of a page, if not those of ``pool``.
        """
        self._shard = shard
        self._group = group
        self._page_nbytes = (page_size or pool.page_size) * TOKEN_NBYTES
        self._views = [
            [layer.numpy().data.cast("B") for layer in layers] for layers in pool.buffers
        ]
        self._row_nbytes = [layers[0].nbytes // pool.n_pages for layers in self._views]
        layers = range(pool.spec.num_layers)
        self._in_layer = [pool.spec.components_in(layer) for layer in layers]

    def expected(self, seed: bytes, tokens: bytes, page: int) -> list[list[bytes]]:
        """Bytes by component and layer of page ``page`` of ``tokens`` in the namespace ``seed``."""
        prefix = tokens[: (page + 1) * self._page_nbytes]
        shape = tuple(self._row_nbytes)
        key = (seed, prefix, self._shard, self._page_nbytes, self._group, shape)
        found = self._known.get(key)
        if found is None:
            if len(self._known) > _MAX_KNOWN:
                self._known.clear()
            salt, person = bytes([self._shard]), self._group.encode()
            digest = blake2b(prefix, key=seed[:32], salt=salt, person=person).digest()
            # Each component and layer starts elsewhere in the digest, so that none equals another.
            found = self._known[key] = [
                [_slice(digest, 2 * layer + 5 * component, nbytes) for layer in range(len(layers))]
                for component, (layers, nbytes) in enumerate(
                    zip(self._views, self._row_nbytes, strict=True)
                )
            ]
        return found

    def write(self, seed: bytes, tokens: bytes, pages: array[int], first: int, last: int) -> None:
        """Computes the pages ``first`` to ``last`` of ``tokens``."""
        for page in range(first, last):
            self.write_page(seed, tokens, page, pages[page])

    def write_page(self, seed: bytes, tokens: bytes, page: int, unit: int) -> None:
        """Computes page ``page`` of ``tokens``, which the pool has as ``unit``."""
        content = self.expected(seed, tokens, page)
        for layers, rows, nbytes in zip(self._views, content, self._row_nbytes, strict=True):
            start = unit * nbytes
            for view, row in zip(layers, rows, strict=True):
                view[start : start + nbytes] = row

    def first_wrong(
        self, seed: bytes, tokens: bytes, pages: array[int], n_pages: int, layer: int
    ) -> int | None:
        """The first of the leading ``n_pages`` whose layer does not hold what it must."""
        for page in range(n_pages):
            if self.is_wrong(seed, tokens, page, pages[page], layer):
                return page
        return None

    def is_wrong(self, seed: bytes, tokens: bytes, page: int, unit: int, layer: int) -> bool:
        """Whether a layer of ``unit`` does not hold that of page ``page`` of ``tokens``."""
        content = self.expected(seed, tokens, page)
        for component, at in self._in_layer[layer]:
            nbytes = self._row_nbytes[component]
            found = self._views[component][at][unit * nbytes : (unit + 1) * nbytes]
            if found != content[component][at]:
                return True
        return False


def _slice(digest: bytes, start: int, nbytes: int) -> bytes:
    return (digest * (2 + (start + nbytes) // len(digest)))[start : start + nbytes]
