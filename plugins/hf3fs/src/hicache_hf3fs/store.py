"""An open store: I/O of pages, metadata and slab files."""

from __future__ import annotations

import importlib
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from hicache_core.errors import BackendDenied, BackendFull, BackendUnavailable, ConfigError
from hicache_core.plugin.backends import ROOM_NBYTES, log_once
from hicache_core.types import BackendContext
from hicache_hf3fs.config import Hf3fsConfig
from hicache_hf3fs.metadata import Binding, Limits, MetadataStore
from hicache_hf3fs.metadata_sqlite import SqliteMetadata
from hicache_hf3fs.page_io import PageIO
from hicache_hf3fs.posix import PosixIO
from hicache_hf3fs.slab import Slab, slab_name, slab_path, slabs_of, slot_nbytes_for
from hicache_hf3fs.usrbio import LIBRARY, UsrbioIO, load_library, mount_of

logger = logging.getLogger(__name__)

DEFAULT_OBJECT_NBYTES = 4 << 20


class Store:
    """Metadata, page I/O and slabs. Slabs of other ranks are opened when they are first read."""

    def __init__(self, prefix: Path, io: PageIO, metadata: MetadataStore) -> None:
        """Opens nothing.

        Args:
            prefix: what the paths of all slab files begin with.
            io: reads and writes the slabs.
            metadata: binds slots to keys.
        """
        self.prefix = prefix
        self.io = io
        self.metadata = metadata
        self.rebuilt = False
        self._lock = threading.Lock()
        self._slabs: dict[str, Slab] = {}
        self._own: Slab | None = None

    @property
    def own(self) -> Slab:
        """The slab of this rank.

        Raises:
            BackendDenied: the store was opened for reading only, so it has none.
        """
        if self._own is None:
            raise BackendDenied(f"{self.prefix} was opened for reading only; nothing is stored")
        return self._own

    def trouble(self) -> str:
        """See ``Openable``."""
        if self._own is not None and self._own.is_removed:
            return f"slab {self._own.path} was removed while in use"
        return self.metadata.trouble()

    def open(self, name: str, file_nbytes: int) -> None:
        """Allocates the slab of this rank and registers it."""
        slab = Slab.allocated(self.prefix, name, file_nbytes)
        try:
            self.io.add_file(slab.fd)
        except BaseException:
            slab.close()
            raise
        self._own = self._slabs[name] = slab
        self.rebuilt = self.attach()
        self.attach_others()

    def attach_others(self) -> None:
        """Registers the slabs of other ranks, which may no longer run."""
        for name in slabs_of(self.prefix):
            if self.metadata.n_slots(name) is None and (slab := self.slab(name)) is not None:
                self.metadata.attach(name, slab.n_slots, slab.scan)

    def attach(self) -> bool:
        """Registers the slab of this rank; returns whether it contained objects."""
        rebuilt = self.metadata.attach(self.own.name, self.own.n_slots, self.own.scan)
        if rebuilt:
            logger.warning(
                "metadata %s knew nothing of %s; rebuilt from its headers",
                self.metadata.where,
                self.own.path,
            )
        return rebuilt

    def slab(self, name: str) -> Slab | None:
        """Returns the slab of a rank; None if its file was removed."""
        found = self._slabs.get(name)
        if found is not None:
            return found
        with self._lock:
            if name not in self._slabs:
                slab = Slab.existing(self.prefix, name)
                if slab is None:
                    return None
                try:
                    self.io.add_file(slab.fd)
                except BaseException:
                    slab.close()
                    raise
                self._slabs[name] = slab
            return self._slabs[name]

    def is_lost(self, binding: Binding | None) -> TypeGuard[Binding]:
        """Returns whether the slab was removed while its directory still exists."""
        if binding is None or self.slab(binding.slot.slab) is not None:
            return False
        return self._own is not None and self._own.path.exists()

    def slab_path(self, binding: Binding) -> Path:
        """Returns the file of a binding."""
        return slab_path(self.prefix, binding.slot.slab)

    def io_stats(self) -> Mapping[str, float]:
        """Returns the counters of the current mode."""
        return {"lost_rings": self.io.lost_rings} if isinstance(self.io, UsrbioIO) else {}

    def close(self) -> None:
        """Withdraws the files from page I/O, closes them, and disconnects."""
        for slab in self._slabs.values():
            self.io.remove_file(slab.fd)  # before the descriptor's number can be another file's
            slab.close()
        self._slabs.clear()
        self.io.close()
        self.metadata.close()


def open_store(settings: Hf3fsConfig, context: BackendContext) -> Store:
    """Connects and allocates everything; if anything fails, nothing stays open."""
    prefix = settings.file_path_prefix.absolute()
    if not prefix.parent.is_dir():
        raise BackendUnavailable(
            f"directory {prefix.parent} does not exist; mount the file system or create it"
        )
    if not context.creates:
        return _looking(settings, prefix)
    object_nbytes = settings.slot_nbytes or context.object_nbytes or DEFAULT_OBJECT_NBYTES
    slot_nbytes = slot_nbytes_for(object_nbytes)
    if settings.file_size < slot_nbytes:
        raise ConfigError(
            f"file_size is {settings.file_size}, but one slot for objects of {object_nbytes} bytes "
            f"takes {slot_nbytes}; raise file_size"
        )
    io = _page_io(settings, prefix)
    store = Store(prefix, io, _metadata(settings, prefix))
    name = slab_name(context.rank, slot_nbytes)
    try:
        io.open()
        _open_metadata(store, name)
        store.open(name, settings.file_size)
    except BaseException:
        store.close()
        raise
    return store


def _open_metadata(store: Store, name: str) -> None:
    """Opens the metadata; on a full disk the slab of this rank frees some slots."""
    try:
        store.metadata.open()
    except BackendFull as exc:
        slab = Slab.existing(store.prefix, name)
        if slab is None:
            raise
        try:
            if not slab.give_room(ROOM_NBYTES):
                raise
        finally:
            slab.close()
        logger.warning("%s; %s gave up its last slots for it", exc, slab.path)
        store.metadata.open()


def _looking(settings: Hf3fsConfig, prefix: Path) -> Store:
    """Opens the store for reading only; creates no slab.

    Raises:
        BackendUnavailable: there is no store.
    """
    if not slabs_of(prefix):
        raise BackendUnavailable(f"{prefix} has no slab; check file_path_prefix")
    io = _page_io(settings, prefix)
    store = Store(prefix, io, _metadata(settings, prefix))
    try:
        io.open()
        store.metadata.open()
        store.attach_others()
    except BaseException:
        store.close()
        raise
    return store


def _page_io(settings: Hf3fsConfig, prefix: Path) -> PageIO:
    """Returns the page I/O of the mode that is set or possible here; logs it once."""
    library = load_library() if settings.mode != "posix" else None
    mount = mount_of(library, prefix.parent) if library is not None else None
    if library is not None and mount is not None:
        log_once(logger, logging.INFO, f"{prefix}: mode usrbio, 3FS mount {mount}")
        return UsrbioIO(
            library,
            mount,
            n_rings=settings.numjobs,
            entries=settings.entries,
            iovec_nbytes=settings.iovec_nbytes,
            timeout_s=settings.io_timeout_s,
        )
    why = (
        f"{LIBRARY} is not installed"
        if library is None
        else f"{prefix.parent} is not in a 3FS mount"
    )
    if settings.mode == "usrbio":
        raise BackendUnavailable(f"mode usrbio is not possible: {why}; set mode to auto or posix")
    why = "as configured" if settings.mode == "posix" else why
    log_once(logger, logging.INFO, f"{prefix}: mode posix, {why}")
    return PosixIO(settings.numjobs)


def _metadata(settings: Hf3fsConfig, prefix: Path) -> MetadataStore:
    """Returns the metadata store named by the URL."""
    url = settings.metadata_url.get_secret_value() if settings.metadata_url else ""
    limits = Limits(
        settings.metadata_timeout_s,
        settings.lease_s,
        settings.write_lease_s,
        settings.ttl_s,
        settings.namespace_quota_nbytes,
    )
    if not url:
        return SqliteMetadata(prefix.with_name(f"{prefix.name}.index.sqlite"), limits)
    if url.startswith("sqlite://"):
        return SqliteMetadata(Path(url.removeprefix("sqlite://")), limits)
    try:
        module = importlib.import_module("hicache_hf3fs.metadata_redis")
    except ModuleNotFoundError as exc:
        raise BackendUnavailable(
            "metadata in Redis needs redis-py: pip install 'hicache-hf3fs[redis]'"
        ) from exc
    redis_metadata: MetadataStore = module.RedisMetadata(url, _store_id(prefix), limits)
    return redis_metadata


def _store_id(prefix: Path) -> str:
    """Returns an id of this prefix for Redis, equal on all hosts and mount paths."""
    path = prefix.with_name(f"{prefix.name}.store")
    try:
        with path.open("x") as file:
            file.write(secrets.token_hex(8))
    except FileExistsError:
        pass
    except OSError as exc:
        raise BackendUnavailable(f"{path} cannot be written: {exc.strerror}") from exc
    deadline = time.monotonic() + 1.0
    while True:  # its creator may not have written it yet
        store_id = path.read_text()
        if len(store_id) == 16:
            return store_id
        if time.monotonic() > deadline:
            raise BackendUnavailable(f"{path} does not hold 16 hex digits; remove it")
        time.sleep(0.01)
