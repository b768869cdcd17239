"""TransferWrapper: a transfer backend around another one; passes on what it does not change."""

from __future__ import annotations

from collections.abc import Sequence

from hicache_core.kv_transfer.base import KvTransferBackend, Notice, UnitRows


class TransferWrapper(KvTransferBackend):
    """Passes every call on to ``inner``; subclasses override methods."""

    def __init__(self, inner: KvTransferBackend) -> None:
        """``inner`` is not open yet."""
        super().__init__(inner.config, inner.context)
        self._inner = inner
        self.moves_groups = inner.moves_groups

    def open(self) -> None:
        # docstring inherited
        self._inner.open()

    def close(self, timeout_s: float = 5.0) -> None:
        # docstring inherited
        self._inner.close(timeout_s)

    @property
    def address(self) -> str:
        # docstring inherited
        return self._inner.address

    @property
    def fault(self) -> str:
        # docstring inherited
        return self._inner.fault

    @property
    def n_connections(self) -> int | None:
        # docstring inherited
        return self._inner.n_connections

    def introduce(self, addresses: Sequence[str]) -> None:
        # docstring inherited
        self._inner.introduce(addresses)

    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        # docstring inherited
        self._inner.offer(room, n_tokens, timeout_s)

    def send(
        self,
        room: int,
        pages: Sequence[int],
        layer: int,
        start: int,
        stop: int,
        group: int | None = None,
    ) -> None:
        # docstring inherited
        if group is None:  # a backend may know of no groups
            self._inner.send(room, pages, layer, start, stop)
        else:
            self._inner.send(room, pages, layer, start, stop, group)

    def finish(self, room: int, note: bytes) -> None:
        # docstring inherited
        self._inner.finish(room, note)

    def receive(
        self,
        room: int,
        addresses: Sequence[str],
        pages: Sequence[int],
        tokens: tuple[int, int],
        timeout_s: float,
        groups: Sequence[UnitRows] = (),
    ) -> None:
        # docstring inherited
        if groups:
            self._inner.receive(room, addresses, pages, tokens, timeout_s, groups)
        else:  # a backend may know of no groups
            self._inner.receive(room, addresses, pages, tokens, timeout_s)

    def cancel(self, room: int, reason: str) -> None:
        # docstring inherited
        self._inner.cancel(room, reason)

    def poll(self) -> list[Notice]:
        # docstring inherited
        return self._inner.poll()
