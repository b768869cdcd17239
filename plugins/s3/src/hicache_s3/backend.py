"""Pages in an S3 bucket, streamed between page memory and store over several connections."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

from hicache_core.errors import BackendError, UseAfterClose
from hicache_core.plugin.backends import n_leading, nbytes_of
from hicache_core.storage.base import (
    BackendConfig,
    Buffer,
    Finding,
    StorageBackend,
    namespace_of,
)
from hicache_core.types import BackendContext, Page
from hicache_s3.config import S3Config
from hicache_s3.diagnose import diagnose
from hicache_s3.endpoint import Endpoint
from hicache_s3.index import IndexCache, PackIndex
from hicache_s3.objects import Counts, Objects
from hicache_s3.pages import Alone, Found, Pages, is_pack_name, key_of, page_name
from hicache_s3.reading import read_batch
from hicache_s3.request_threads import RequestThreads
from hicache_s3.search import Search
from hicache_s3.usage import usage_by_namespace
from hicache_s3.writing import pages_per_pack, write_batch

_COUNTERS = (
    "hits",
    "misses",
    "writes",
    "dropped_writes",
    "puts",
    "read_nbytes",
    "written_nbytes",
    "slow_downs",
)
_LIKELY_PACK_PAGES = 32
_MAX_SEEN = 4096
_NAMESPACE_NCHARS = 17  # 16 hex digits and the slash


class S3Backend(StorageBackend):
    """Immutable objects in a bucket that any number of servers share.

    Small pages of one write become one object, a pack, and are read back by one ranged request for
    each run. A page that is stored alone is an object of its own.
    """

    name: ClassVar[str] = "s3"
    Config: ClassVar[type[BackendConfig]] = S3Config

    def __init__(self, config: S3Config, context: BackendContext) -> None:
        super().__init__(config, context)
        self.settings = config
        self._store: Pages | None = None
        self._counts = Counts(_COUNTERS)
        self._seen_nbytes: dict[
            str, int
        ] = {}  # of a page of each namespace, as last written or read

    def check_reachable(self) -> None:
        objects = self._objects()
        try:
            objects.fetch(_absent_name())
        except BackendError as error:
            if not (_lacks_bucket(error) and self._creates_bucket):
                raise
        finally:
            objects.close()

    def open(self) -> None:
        if self._store is not None:
            return
        settings, objects = self.settings, self._objects()
        try:
            _check_bucket(objects, creates=self._creates_bucket)
        except BaseException:
            objects.close()
            raise
        self._store = Pages(objects, IndexCache(settings.index_cache_packs, settings.index_ttl_s))

    def _objects(self) -> Objects:
        settings = self.settings
        threads = RequestThreads(settings.threads)
        return Objects(settings, Endpoint(settings), threads, self._counts)

    @property
    def _creates_bucket(self) -> bool:
        return self.settings.create_bucket and self.context.creates

    def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.objects.close()

    def get(self, key: str) -> Buffer | None:
        value = self._opened().value(key)
        if value is None:
            self._counts.add(misses=1)
        else:
            self._counts.add(hits=1, read_nbytes=value.nbytes)
        return value

    def exists(self, key: str) -> bool:
        return self._opened().find(key, packed=self._likely_stride(key) > 1) is not None

    def set(self, key: str, value: Buffer) -> None:
        self._opened().objects.store(page_name(key), (memoryview(value).cast("B"),))
        self._counts.add(writes=1)

    def delete(self, keys: Sequence[str]) -> None:
        store = self._opened()
        gone = frozenset(keys)
        packs = self._packs_of(store, list(gone))
        names = [page_name(key) for key in gone]
        for index in packs:
            store.cache.drop(index)
            rest = index.without(gone)
            if rest.slots:
                # First the keys that stay lead to an index without those that go.
                store.threads.run(partial(store.write_index, index=rest), rest.slots)
                store.cache.add(rest)
            else:
                names.append(index.pack_name)
        if names:
            store.objects.remove(names)

    def batch_exists(self, keys: Sequence[str]) -> int:
        return self._look_up(keys, leading=True).end

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_get_visiting(keys, pages, lambda _: True)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_set_visiting(keys, pages, lambda _: None)

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return [place is not None for place in self._look_up(keys, leading=False).places]

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.get_each_visiting(keys, pages, lambda _: True)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.set_each_visiting(keys, pages, lambda _: None)

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        # docstring inherited from VisitsPages
        return n_leading(self._read(keys, pages, arrived, leading=True))

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        # docstring inherited from VisitsPages
        n_stored = n_leading(self._write(keys, pages, leaving))
        self._counts.add(writes=n_stored, dropped_writes=len(keys) - n_stored)
        return n_stored

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage
        return self._read(keys, pages, arrived, leading=False)

    def set_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage
        stored = self._write(keys, pages, leaving)
        self._counts.add(writes=sum(stored), dropped_writes=stored.count(False))
        return stored

    def bounds_calls(self) -> bool:
        """Returns whether the backend is open and each wait of its calls has a limit.

        No thread goes on after its call. Only credentials from a program (``credential_process``)
        have no limit: botocore waits for it.
        """
        return self._store is not None and self._store.objects.endpoint.signs_in_time

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yields every key that starts with ``prefix``; one request for a thousand keys."""
        listed = self._opened().objects.listed(page_name(prefix))
        return (key for name, _ in listed if (key := key_of(name)) is not None)

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; how many there were.

        What other tools put below the prefix of the settings stays.
        """
        store = self._opened()
        names = store.objects.names(page_name(prefix))
        keys = [key for name in names if (key := key_of(name)) is not None]
        if len(prefix) > _NAMESPACE_NCHARS:  # packs may hold other pages as well
            self.delete(keys)
            return len(keys)
        store.cache.clear()
        packs = [name for name in store.objects.names(f"packs/{prefix}") if is_pack_name(name)]
        store.objects.remove([*map(page_name, keys), *packs])
        return len(keys)

    def usage(self) -> Mapping[str, int]:
        """Returns bytes by namespace. Slow: a listing, and one request for each pack."""
        return usage_by_namespace(self._opened())

    def stats(self) -> Mapping[str, float]:
        """Returns pages and bytes read, written, missed and dropped since ``open``, and retries."""
        store = self._opened()
        return {**self._counts.copy(), "known_packs": float(len(store.cache))}

    def diagnose(self) -> Iterator[Finding]:
        """Yields findings on bucket, access rights, lifecycle rules and latency."""
        return diagnose(self._opened().objects)

    def _look_up(self, keys: Sequence[str], *, leading: bool) -> Search:
        store = self._opened()
        stride = self._likely_stride(keys[0]) if keys else 1
        search = Search(keys, stride, leading=leading)

        def ask(n: int) -> Found:
            return store.find(keys[n], packed=search.stride > 1)

        search.run(store.threads, ask)
        return search

    def _read(
        self,
        keys: Sequence[str],
        pages: Sequence[Page],
        arrived: Callable[[int], bool],
        *,
        leading: bool,
    ) -> list[bool]:
        """Reads pages.

        Args:
            keys: one for each page.
            pages: where to.
            arrived: as for ``batch_get_visiting``.
            leading: whether to ignore what is behind a gap.

        Returns:
            For each page whether it was filled.
        """
        _check_lengths(keys, pages)
        store = self._opened()
        if not keys:
            return []
        self._has_seen(keys[0], pages[0])
        search = Search(keys, self._stride(nbytes_of(pages[0])), leading=leading)
        filled = read_batch(search, pages, store, arrived)
        counted = pages[: n_leading(filled)] if leading else list(itertools.compress(pages, filled))
        nbytes = sum(nbytes_of(page) for page in counted)
        self._counts.add(hits=len(counted), misses=len(keys) - len(counted), read_nbytes=nbytes)
        return filled

    def _write(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> list[bool]:
        """Stores pages.

        Args:
            keys: one for each page.
            pages: what to store.
            leaving: as for ``batch_set_visiting``.

        Returns:
            For each page whether it is stored.
        """
        _check_lengths(keys, pages)
        store = self._opened()
        if keys:
            self._has_seen(keys[0], pages[0])
        pack_nbytes = self.settings.pack_nbytes if self.settings.pack else 0
        return write_batch(keys, pages, pack_nbytes=pack_nbytes, store=store, leaving=leaving)

    def _opened(self) -> Pages:
        store = self._store
        if store is None:
            raise UseAfterClose("the s3 backend is not open")
        return store

    def _has_seen(self, key: str, page: Page) -> None:
        """Remembers how long the pages of a namespace are."""
        if len(self._seen_nbytes) > _MAX_SEEN:
            self._seen_nbytes.clear()
        self._seen_nbytes[namespace_of(key)] = nbytes_of(page)

    def _likely_stride(self, key: str) -> int:
        """As ``_stride``, for keys whose pages are not at hand; ``key`` is the first.

        Where one question is about pages of several sizes, the smallest decide: a page that is
        found alone costs one more round, but to take packed pages for single ones costs a request
        for each of them.
        """
        context = self.context
        seen_nbytes = self._seen_nbytes.get(namespace_of(key), 0)
        return self._stride(context.least_nbytes or seen_nbytes or context.object_nbytes)

    def _stride(self, page_nbytes: int) -> int:
        """Returns how many pages a pack is likely to have; ``page_nbytes`` is 0 if unknown."""
        if not self.settings.pack:
            return 1
        if page_nbytes == 0:
            return _LIKELY_PACK_PAGES
        return pages_per_pack(page_nbytes, self.settings.pack_nbytes)

    def _packs_of(self, store: Pages, keys: Sequence[str]) -> list[PackIndex]:
        """Returns the packs with any of ``keys``, from the store and from the cache."""
        search = Search(keys, 1, leading=False)
        search.run(store.threads, lambda n: store.find(keys[n], packed=self.settings.pack))
        found = [place for place in search.places if place and not isinstance(place, Alone)]
        known = [index for key in keys if (index := store.cache.find(key)) is not None]
        return list({index.pack_name: index for index in [*found, *known]}.values())


def _check_bucket(objects: Objects, *, creates: bool) -> None:
    """Asks for an object that is not there: address, bucket, credentials and rights show.

    Raises:
        BackendError: with what was found and what to do.
    """
    name = _absent_name()
    try:
        objects.fetch(name)
    except BackendError as error:
        if not (creates and _lacks_bucket(error)):
            raise
        objects.create_bucket()
        objects.fetch(name)


def _absent_name() -> str:
    """The name of an object that nobody has stored."""
    return f"probe-{secrets.token_hex(8)}"


def _lacks_bucket(error: BackendError) -> bool:
    return "NoSuchBucket" in str(error)


def _check_lengths(keys: Sequence[str], pages: Sequence[Page]) -> None:
    if len(keys) != len(pages):
        raise ValueError(f"{len(keys)} keys do not fit {len(pages)} pages")
