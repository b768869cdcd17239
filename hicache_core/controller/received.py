"""Pages that another server computed, and may have stored: storage is asked before a write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from hicache_core.controller.attachment import Attachment
from hicache_core.controller.parts import Parts
from hicache_core.kv.keys import TOKEN_NBYTES, PageKeys
from hicache_core.radix.node import Node, Received, adopt_digests, path_to
from hicache_core.types import ExistsJob, JobResult, Tier


class ReceivedPages:
    """Asks once which received pages storage has, so that only the others are written.

    Nothing is locked meanwhile: a store that hangs keeps no page. Pages that leave before the
    answer comes are not written. Owner thread only.
    """

    def __init__(self, parts: Parts, consider: Callable[[Node], None]) -> None:
        """Calls ``consider`` with the end of each prefix whose answer has come."""
        self._parts = parts
        self._consider = consider
        self._n_questions = 0

    @property
    def idle(self) -> bool:
        """Whether every question was answered."""
        return not self._n_questions

    def mark(self, nodes: Sequence[Node]) -> None:
        """Marks ``nodes``, which have just got pages from another server."""
        for node in nodes:
            if node.host_pages is None and node.stored_in != self._parts.epoch:
                node.stored_in, node.received = 0, Received.UNCHECKED

    def ask(self, node: Node, storage: Attachment) -> None:
        """Asks ``storage`` for the first run of received pages on the path to ``node``.

        ::

            path  | known | received | received | computed here |
                          | asked now .......... |
        """
        parts = self._parts
        path = path_to(node)
        start = next(n for n, at in enumerate(path) if at.received is Received.UNCHECKED)
        stop = start
        while stop < len(path) and path[stop].received is Received.UNCHECKED:
            path[stop].received = Received.CHECKING
            stop += 1
        above, root = path[start].parent, path[0].parent
        assert above is not None
        assert root is not None
        prefix = b"".join(at.tokens for at in path[:stop])
        first_page = path[start].depth_pages
        tail = memoryview(prefix)[first_page * parts.page_size * TOKEN_NBYTES :]
        keys = PageKeys(storage.namespace, tail, parts.page_size, parts.tree.last_digest(above))
        settle = partial(self._answered, storage.epoch, prefix, root.key, keys)
        self._n_questions += 1
        assert parts.storage is not None
        parts.storage.submit(storage, ExistsJob(parts.jobs.add(settle), keys), _pages_found)

    def _answered(
        self, epoch: int, prefix: bytes, seed: bytes, keys: PageKeys, n_found: int
    ) -> None:
        """Marks which pages storage has, as far as they are still cached.

        Args:
            epoch: of the storage that was asked. If it was detached or cleared since, the answer
                counts for nothing.
            prefix: packed tokens up to the last page that was asked for.
            seed: seed of the chain.
            keys: of the pages that were asked for, the last of ``prefix``.
            n_found: leading pages of them that storage has.
        """
        parts = self._parts
        self._n_questions -= 1
        page_nbytes = parts.page_size * TOKEN_NBYTES
        first_page = len(prefix) // page_nbytes - len(keys)
        if n_found and epoch == parts.epoch:
            found = parts.tree.locate(prefix[: (first_page + n_found) * page_nbytes], seed).node
            self._adopt(found, first_page, keys)
            for node in self._checking(found, first_page):
                node.stored_in, node.received = epoch, Received.NO
                parts.counters.store_skipped_pages += node.n_pages
                parts.tell_stored(Tier.STORAGE, node)
        left = parts.tree.locate(prefix, seed).node
        for node in self._checking(left, first_page):
            node.received = Received.NO
        if left.n_pages:
            self._consider(left)

    def _checking(self, node: Node, first_page: int) -> list[Node]:
        """Nodes on the path to ``node``, from ``first_page`` on, that wait for an answer."""
        return [
            at
            for at in path_to(node)
            if at.received is Received.CHECKING and at.depth_pages >= first_page
        ]

    def _adopt(self, node: Node, first_page: int, keys: PageKeys) -> None:
        """Keeps the digests that the storage thread has computed."""
        n_pages = node.depth_pages + node.n_pages - first_page
        if n_pages > 0 and any(at.depth_pages == first_page for at in path_to(node)):
            adopt_digests(node, n_pages, keys[:n_pages].digests)


def _pages_found(result: JobResult) -> int:
    return result.n_pages
