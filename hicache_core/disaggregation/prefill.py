"""PrefillConnector: sends the KV of prompts, layer by layer, to decode nodes."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable
from functools import partial

from hicache_core.disaggregation.first_token import FirstToken
from hicache_core.disaggregation.transfer_counts import TransferCounts
from hicache_core.engine.connector import Connector
from hicache_core.engine.request import Output, Request
from hicache_core.engine.task import OnOutput, Task
from hicache_core.errors import HiCacheError
from hicache_core.kv_transfer.base import KvTransferBackend, TransferState

log = logging.getLogger(__name__)


class Outbox:
    """Sends the KV of prompts by a transfer backend: a ``Listener``. Owner thread only.

    A room is offered once. A request that starts over is not sent again: its decode node has heard
    of the failure, and computes the prompt itself.
    """

    def __init__(
        self, transfer: KvTransferBackend, timeout_s: float, counts: TransferCounts
    ) -> None:
        """Starts without rooms.

        Args:
            transfer: open.
            timeout_s: a room that is not handed over by then has failed.
            counts: of this node, updated here.
        """
        self._transfer = transfer
        self._timeout_s = timeout_s
        self._counts = counts
        self._rooms: dict[str, int] = {}  # rooms without a notice, by request
        self._offered: set[str] = set()  # requests that have not ended
        self._complete: set[str] = set()

    def wants(self, request: Request) -> bool:
        # docstring inherited
        if request.bootstrap is None or request.request_id in self._offered:
            return False
        self._offered.add(request.request_id)
        try:
            self._transfer.offer(request.bootstrap.room, len(request.tokens), self._timeout_s)
        except HiCacheError as error:
            log.warning("KV of request %s is sent nowhere: %s", request.request_id, error)
            return False
        self._rooms[request.request_id] = request.bootstrap.room
        return True

    def computed(
        self,
        request: Request,
        pages: array[int],
        layer: int,
        start: int,
        stop: int,
        group: int | None = None,
    ) -> None:
        # docstring inherited
        room = self._rooms.get(request.request_id)
        if room is not None:
            self._transfer.send(room, tuple(pages), layer, start, stop, group)

    def ended(self, request: Request, *, complete: bool) -> None:
        # docstring inherited
        room = self._rooms.get(request.request_id)
        if room is None:
            return
        if complete:
            self._complete.add(request.request_id)
        else:
            self._transfer.cancel(room, "the prefill node gave the request up")

    def holds(self, request_id: str) -> bool:
        # docstring inherited
        return request_id in self._rooms

    def leave(self, request_id: str) -> None:
        """Cancels the room of a request whose client has left; its notice follows."""
        if (room := self._rooms.get(request_id)) is not None:
            self._transfer.cancel(room, "the client has left")

    def step(self) -> None:
        # docstring inherited
        for notice in self._transfer.poll():
            self._rooms = {key: room for key, room in self._rooms.items() if room != notice.room}
            if notice.state is TransferState.SENT:
                self._counts.sent += 1
                self._counts.nbytes += notice.nbytes
            else:
                self._counts.failed += 1
                self._counts.last_error = notice.error
                log.warning("KV of room %d was not sent: %s", notice.room, notice.error)

    def finish(self, request: Request, first: FirstToken | None) -> None:
        """Ends a request: sends its first token, or cancels its room if ``first`` is None."""
        if request.bootstrap is None:
            return
        request_id = request.request_id
        if request_id not in self._offered and self.wants(request):
            self.ended(request, complete=False)  # before its turn: whoever waits for it is told
        elif request_id in self._complete and first is not None:
            self._transfer.finish(request.bootstrap.room, first.pack())
        elif request_id in self._rooms:
            self._transfer.cancel(request.bootstrap.room, "the request was given up")
        self._offered.discard(request_id)
        self._complete.discard(request_id)


class PrefillConnector(Connector):
    """Ends requests with a room at their first token, and keeps them until their KV was fetched.

    The pages are kept until the notice of the transfer, which reads them. The client gets its
    output at that moment, too; until then it can still abort the request and so free the pages.
    Requests without a room are answered here, as by any server.
    """

    def __init__(self, outbox: Outbox, transfer: KvTransferBackend) -> None:
        """``outbox`` sends by ``transfer``, which ``close`` closes."""
        self._outbox = outbox
        self._transfer = transfer
        self._last_words: dict[str, Callable[[], None]] = {}  # of requests that wait to be fetched

    @property
    def is_busy(self) -> bool:
        # docstring inherited
        return bool(self._last_words)

    def requests(self) -> Iterable[str]:
        # docstring inherited
        return list(self._last_words)

    def takes(self, task: Task) -> bool:
        # docstring inherited
        if task.request.bootstrap is not None:
            task.n_new_max = 1
            task.tell_by(self._hold)
        return False

    def step(self) -> None:
        # docstring inherited
        for request_id in [key for key in self._last_words if not self._outbox.holds(key)]:
            self._last_words.pop(request_id)()

    def abort(self, request_id: str) -> Task | None:
        # docstring inherited; for the scheduler such a request has ended already
        if (tell := self._last_words.pop(request_id, None)) is not None:
            self._outbox.leave(request_id)
            tell()
        return None

    def ended(self, task: Task, tokens: tuple[int, ...]) -> None:
        # docstring inherited
        first = FirstToken(tokens[0], task.cached) if len(tokens) == 1 else None
        self._outbox.finish(task.request, first)

    def give_up(self) -> None:
        # docstring inherited
        self._last_words.clear()

    def close(self) -> None:
        # docstring inherited
        self._transfer.close()

    def _hold(self, tell: OnOutput, output: Output) -> None:
        """The one output of a request whose rows are to be fetched waits until that has ended."""
        if output.finish_reason in ("abort", "error"):
            tell(output)
        else:
            self._last_words[output.request_id] = partial(tell, output)
