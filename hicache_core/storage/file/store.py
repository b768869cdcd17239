"""An open store of the file backend: its directory, and the space in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from hicache_core.errors import BackendError
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.file.directory import FileDirectory
from hicache_core.storage.file.index import Row
from hicache_core.storage.file.quota import FileQuota
from hicache_core.storage.file.space import FileSpace

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.9
"""Default of ``max_nbytes``, as a fraction of held and free bytes together."""


class FileStore:
    """An open directory of the file backend.

    Attributes:
        directory: its files.
        index: of ``directory``.
        records: of ``directory``.
        space: hands out extents.
    """

    def __init__(self, settings: FileConfig, clock: Callable[[], float], *, creates: bool) -> None:
        """Opens it.

        Args:
            settings: of the backend.
            clock: seconds since the epoch.
            creates: whether to create a store where there is none.

        Raises:
            BackendError: the message says what to do.
        """
        self._path = settings.path
        self.directory = FileDirectory(
            settings.path, timeout_s=settings.lock_timeout_s, durable=settings.fsync
        )
        self.directory.open(creates=creates)
        self.index, self.records = self.directory.index, self.directory.store
        quota = FileQuota(self.index, settings.namespace_quota_nbytes, clock)
        self.space = FileSpace(
            self.index, self.records, ttl_s=settings.ttl_s, quota=quota, clock=clock
        )
        self.space.owner = self.directory.owner
        self._epoch = self.index.epoch
        try:
            self.space.max_nbytes = settings.max_nbytes or self._default_cap()
            self.directory.with_room(self.space.trim)
            self.index.check_late()  # last: if it finds damage while opening, opening would fail
        except BaseException:
            self.directory.close()
            raise

    def trouble(self) -> str:
        """See ``Openable``."""
        return self.directory.trouble()

    def close(self) -> None:
        """Stores the times of use, and releases everything."""
        try:
            if not self.trouble():
                self.space.flush_uses()
        except BackendError as exc:  # affects only the order of eviction
            logger.warning("%s: the last times of use were not stored: %s", self._path, exc)
        self.directory.close()

    def lookup(self, keys: Sequence[str]) -> tuple[int, list[Row | None]]:
        """As ``FileIndex.lookup``; also closes the files of removed segments."""
        version, rows = self.index.lookup(keys)
        if self.index.epoch != self._epoch:
            self._epoch = self.index.epoch
            self.records.forget_files(self.index.segments)
        return version, rows

    def _default_cap(self) -> int:
        held = self.index.totals()[2]
        return int(DEFAULT_SHARE * (held + self.records.free_nbytes()))
