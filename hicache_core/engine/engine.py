"""Engine: a model, its cache and the thread that runs both, with methods for other threads."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, TypeVar

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine import orders
from hicache_core.engine.batch_check import check_batches
from hicache_core.engine.config import EngineConfig, EngineStatus
from hicache_core.engine.detokenize import TextStream
from hicache_core.engine.feed import Listener
from hicache_core.engine.limits import Limits
from hicache_core.engine.logits_rules import LogitsRules
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.page_table import PageTable
from hicache_core.engine.request import Output, Request
from hicache_core.engine.runner import Runner
from hicache_core.engine.sampling import Sampler, check_sampling
from hicache_core.engine.scheduler import MakeScheduler, Scheduler
from hicache_core.engine.shard import shard
from hicache_core.engine.status import status_of
from hicache_core.engine.task import Task
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.engine.units import SequenceUnits
from hicache_core.engine.watchdog import Watchdog
from hicache_core.errors import ConfigError, QueueFull, RankLost, UseAfterClose
from hicache_core.integrations.identity import ModelIdentity
from hicache_core.integrations.model_check import check_model
from hicache_core.integrations.model_spec import full_kv_spec_of, kv_spec_of
from hicache_core.pools.device import DevicePool
from hicache_core.process.main_thread import main_has_ended
from hicache_core.types import Namespace

__all__ = ["Engine", "EngineConfig", "EngineStatus"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Clock = Callable[[], float]
OnOutput = Callable[[Output], None]
Act = Callable[[], None]

_IDLE_S = 0.02
"""An engine without requests polls its cache this often, since writes may still be running."""

_STALL_S = 0.005
"""How long it waits for storage when no request can be computed."""

_ONE_RANK_ONLY = (
    "an engine on several ranks has a listener on each of them: let make_scheduler, which every "
    "rank calls, put it into the scheduler's feed"
)


class Engine:
    """Answers requests with a model whose prefixes come from HiCache.

    The engine's own thread runs everything between ``open`` and ``close``. Any thread may call the
    public methods, except that the engine's thread must not call ``call``, ``call_all`` or
    ``close``, which wait for it.

    With several ranks, each process has an engine with the same arguments. Requests and calls go to
    the engine of rank 0, which tells the others once a step; on the others only ``open`` and
    ``join`` are called. When a rank is lost, all ranks stop and every request ends with ``error``.
    ``identity`` is the model's, from ``open`` on: tell it about weights that change in place.

    If the main thread ends before ``close`` was called, the engine ends too: running requests are
    aborted, and writes that have not finished are lost.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache_config: HiCacheConfig,
        config: EngineConfig,
        *,
        ranks: TensorRanks | None = None,
        clock: Clock = time.monotonic,
        make_scheduler: MakeScheduler = Scheduler,
        moves_groups: bool = False,
    ) -> None:
        """Keeps its arguments; ``open`` starts.

        Args:
            model: is computed; with ``ranks``, ``open`` leaves the rank's part of it.
            cache_config: of the cache.
            config: of the engine.
            ranks: who computes the model together; nobody else may use them.
            clock: seconds.
            make_scheduler: called by ``open``; ``Role.make_scheduler`` for half of a pair.
            moves_groups: whether what ``make_scheduler`` puts beside the scheduler takes windows
                and states, too; ``Role.moves_groups`` for half of a pair. If not, layers with a
                window keep all pages, and a model with states is refused.
        """
        self._model = model
        self._cache_config = cache_config
        self._make_scheduler = make_scheduler
        self._moves_groups = moves_groups or make_scheduler is Scheduler
        self._config = config
        self._ranks = ranks
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._deadline_s = inf
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._orders: deque[tuple[orders.Order | None, Act]] = deque()  # None: not for all ranks
        self._calls: set[Future[object]] = set()
        self._n_queued = 0
        self._n_arrived = 0
        self._tasks: dict[str, Task] = {}
        self._closing = False
        self._drain_s = 0.0
        self._error = ""

    def open(self) -> None:
        """Builds pools and cache, and starts the thread.

        Raises:
            SpecError: the model cannot be cached or batched; the message says why.
            NotEnoughMemory, ConfigError, PluginError, BackendError: as ``HiCache``.
            ConfigError: the model cannot be split over the ranks, its generation config asks for
                something that the engine cannot do, or ``context_length`` is too large.
            RankLost: another rank could not open its engine.
        """
        model = self._model.model
        self._rules = LogitsRules.of(model)
        probe = check_model(model)
        self.identity = ModelIdentity(model)
        # What cuts objects by heads, and whatever moves full pages only, gets windows in those as
        # well.
        cuts_heads = self._ranks is not None and self._cache_config.storage_head_group is not None
        keeps_groups = self._moves_groups and not cuts_heads
        spec_of = kv_spec_of if keeps_groups else full_kv_spec_of
        spec = spec_of(model, self.identity.fingerprint)
        check_batches(model, spec, probe)
        page_size = self._cache_config.page_size
        if self._ranks is not None:
            spec = shard(model, spec, self._ranks)
            self.identity.settle()
        self._limits = Limits.of(self._model, spec, self._config, self._cache_config)
        if self._ranks is not None:
            self._limits = self._limits.agreed(self._ranks, page_size)
        n_pages = self._limits.n_slots // page_size
        n_units = self._limits.n_units
        self._pool = DevicePool.with_groups(spec, page_size, n_pages, n_units, model.device)
        self._cache = HiCache(
            self._cache_config, spec, self._pool, clock=self._clock, ranks=self._ranks
        )
        snapshot_interval = self._cache_config.state_snapshot_interval
        self._units = SequenceUnits(
            self._cache, spec.groups, snapshot_interval, keeps_answers=probe.decodes_alike
        )
        self._scheduler = self._make_scheduler(
            self._cache,
            Runner(model, self._pool),
            self._config,
            n_pages=n_pages,
            clock=self._clock,
            ranks=self._ranks,
        )
        self._watchdog = Watchdog(self._config.stall_timeout_s, self._clock)
        self._thread = threading.Thread(target=self._run, name="hicache-engine")
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Refuses new requests, finishes the present ones and drains backups; idempotent.

        Requests that have not ended after ``timeout_s`` end with ``abort``; the cache then has the
        same time again for its writes.
        """
        with self._changed:
            self._drain_s = timeout_s
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def join(self) -> None:
        """Blocks until the engine's thread has ended; other ranks end together with rank 0."""
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queues a request; returns at once.

        Args:
            request: what to answer.
            on_output: called on the engine's thread, at most once a step; the last output has a
                ``finish_reason``. It must neither block nor raise.

        Raises:
            QueueFull: ``max_waiting`` requests wait already.
            InvalidTokens: the prompt is empty, has unknown token ids, or does not fit into the
                context or the device pool; or a request with this id has not ended.
            ConfigError: a sampling parameter is out of range, or the model has a hook that is not
                part of its fingerprint.
            UseAfterClose: the engine is not open, closing, or has stopped.
        """
        check_sampling(request.sampling)
        if self._thread is not None:  # what weights and adapters are now is part of the name
            request = replace(request, namespace=self.identity.namespace(request.namespace))
        with self._changed:
            self._check_open()
            n_new_max = self._limits.n_new_max(request)
            self._limits.check_id(request.request_id, self._tasks)
            n_waiting = self._n_queued + self._scheduler.n_waiting
            if n_waiting >= self._config.max_waiting:
                raise QueueFull(
                    f"{n_waiting} requests wait, max_waiting is {self._config.max_waiting}; "
                    "try again later"
                )
            self._n_arrived += 1
            seed = request.sampling.seed
            seed = secrets.randbits(63) if seed is None else seed
            order = orders.Add(request, self._n_arrived, seed, n_new_max)
            task = self._task(order, on_output)
            task.progressed_s = self._clock()
            task.note(arrived=task.progressed_s)
            self._tasks[request.request_id] = task
            self._n_queued += 1
            self._orders.append((order, partial(self._add, task)))
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request with ``abort``, whatever its state; does nothing if it has ended."""
        with self._changed:
            if request_id in self._tasks:
                act = partial(self._scheduler.abort, request_id)
                self._orders.append((orders.Abort(request_id), act))
                self._changed.notify()

    def call(self, work: Callable[[HiCache], T], timeout_s: float) -> T:
        """Runs ``work`` on the engine's thread, between two steps, and returns its result.

        With several ranks it runs on rank 0 only, so it must not change the cache.

        Args:
            work: gets the cache.
            timeout_s: how long to wait for it.

        Raises:
            TimeoutError: it did not run in time; it may still run later.
            UseAfterClose: the engine is closed.
            Whatever ``work`` raises.
        """
        return self._order(None, work, timeout_s)

    def call_all(self, method: str, *arguments: object, timeout_s: float) -> Any:
        """Calls a method of the cache on every rank's engine thread; returns rank 0's result.

        Args:
            method: one of ``ALLOWED_CALLS``.
            arguments: values that JSON knows.
            timeout_s: as of ``call``.

        Raises:
            ConfigError: ``method`` is not one of ``ALLOWED_CALLS``.
            As ``call``.
        """
        call = orders.call_of(method, arguments)
        return self._order(call, partial(orders.called, call), timeout_s)

    def namespace(self, namespace: Namespace) -> Namespace:
        """The namespace of a request, with what weights and adapters are now; any thread."""
        return namespace if self._thread is None else self.identity.namespace(namespace)

    @property
    def cache(self) -> HiCache:
        """The cache. Other threads may use its ``snapshot`` and ``explain``; see also ``call``."""
        return self._cache

    @property
    def pool(self) -> DevicePool:
        """The device pages; other threads may read pages that stay locked meanwhile."""
        return self._pool

    def listen(self, listener: Listener) -> None:
        """Tells ``listener`` about the KV of prompts. Call it after ``open``, before ``submit``.

        ``close`` waits at most its own time for pages that the listener holds: end it first.

        Raises:
            ConfigError: the engine has several ranks, or the model keeps windows or states beside
                the full pages.
        """
        if self._ranks is not None:
            raise ConfigError(_ONE_RANK_ONLY)
        if groups := [group.name for group in self._pool.spec.groups]:
            raise ConfigError(
                f"a listener gets full pages, and this engine keeps {', '.join(groups)} beside "
                "them: let make_scheduler put the listener into the scheduler's feed, so that the "
                "full pages have the windows, too"
            )
        self._scheduler.feed.listener = listener

    def status(self) -> EngineStatus:
        """What the engine does now."""
        with self._changed:
            n_queued, error, tasks = self._n_queued, self._error, list(self._tasks.values())
        stalled = "" if error else self._watchdog.look(tasks, self._scheduler.progressed_s)
        return status_of(
            self._scheduler, self._limits, self._pool.page_size, n_queued, error, stalled
        )

    def _check_open(self) -> None:
        if self._error:
            raise UseAfterClose(f"the engine has stopped: {self._error}; start it again")
        if self._thread is None or self._closing:
            raise UseAfterClose("the engine is not open; it takes no requests")
        if not self._leads:
            raise UseAfterClose("this rank does what rank 0 tells it: ask there")

    @property
    def _leads(self) -> bool:
        return self._ranks is None or self._ranks.rank == 0

    def _order(
        self, order: orders.Order | None, work: Callable[[HiCache], T], timeout_s: float
    ) -> T:
        future: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._calls.add(future)  # type: ignore[arg-type]
            self._orders.append((order, partial(self._work, work, future)))
            self._changed.notify()
        return future.result(timeout_s)

    def _task(self, order: orders.Add, on_output: OnOutput) -> Task:
        request = order.request
        params = request.sampling
        task = Task(
            request,
            order.number,
            partial(self._told, on_output),
            PageTable(self._cache, request.namespace, request.priority, self._units.another()),
            Sampler(params, order.seed, self._limits.eos_token_ids, self._rules),
            TextStream(self._model.tokenizer, params.stop, skip_special=params.skip_special_tokens),
        )
        task.n_new_max = order.n_new_max
        return task

    # The thread.

    def _run(self) -> None:
        with contextlib.suppress(RankLost):  # which _stop tells everybody
            try:
                self._serve()
            finally:
                error = sys.exception()
                self._stop("" if error is None else f"{type(error).__name__}: {error}")

    def _serve(self) -> None:
        """Steps until everything that came before ``close`` is done, or its time is over."""
        while True:
            given, acts = self._next_orders()
            for act in acts:
                act()
            if given.is_over:
                self._scheduler.abort_all()
                self._scheduler.close()
                self._scheduler.feed.give_up()
            is_busy = self._scheduler.is_busy
            if given.closing and not is_busy:
                self._scheduler.close()
                self._cache.close(given.drain_s)
                return
            if not self._scheduler.step():
                self._rest(is_busy)

    def _next_orders(self) -> tuple[orders.StepOrders, Sequence[Act]]:
        """What was ordered since the last step; with several ranks one collective, or two."""
        if self._ranks is not None and not self._leads:
            if main_has_ended():
                raise RankLost(
                    f"the main thread of rank {self._ranks.rank} ended before the engine"
                )
            given = orders.decode(self._ranks.first_text(""))
            return given, [self._act_of(order) for order in given.orders]
        with self._changed:
            ordered = list(self._orders)
            self._orders.clear()
            if main_has_ended():  # nobody is left to call close
                self._closing, self._drain_s = True, 0.0
            closing, drain_s = self._closing, self._drain_s
        if closing and self._deadline_s == inf:
            self._deadline_s = self._clock() + drain_s
        is_over = self._clock() >= self._deadline_s
        given = orders.StepOrders(
            tuple(order for order, _ in ordered if order), closing, is_over, drain_s
        )
        if self._ranks is not None:
            self._ranks.first_text(orders.encode(given))
        return given, [act for _, act in ordered]

    def _act_of(self, order: orders.Order) -> Act:
        """What a rank other than 0 does for an order: the same, and nobody is told."""
        if isinstance(order, orders.Add):
            return partial(self._scheduler.add, self._task(order, _silent))
        if isinstance(order, orders.Abort):
            return partial(self._scheduler.abort, order.request_id)
        return partial(orders.follow, order, self._cache)

    def _rest(self, is_busy: bool) -> None:
        """Nothing could be computed: waits for news."""
        if is_busy:
            self._cache.wait(_STALL_S)
            return
        if not self._leads:
            return  # the next turn comes when rank 0 has rested
        with self._changed:
            if not self._orders and not self._closing:
                self._changed.wait(_IDLE_S)

    def _add(self, task: Task) -> None:
        self._scheduler.add(task)
        with self._changed:
            self._n_queued -= 1

    def _told(self, on_output: OnOutput, output: Output) -> None:
        if output.finish_reason is not None:
            with self._changed:
                self._tasks.pop(output.request_id, None)
        try:
            on_output(output)
        except Exception:  # of who listens; on other ranks nobody does
            log.exception("nobody hears of request %s any more", output.request_id)
            self.abort(output.request_id)

    def _work(self, work: Callable[[HiCache], T], future: Future[T]) -> None:
        with self._changed:
            self._calls.discard(future)
        try:
            future.set_result(work(self._cache))
        except Exception as error:  # the caller's own, and goes to the caller whole
            future.set_exception(error)

    def _stop(self, error: str) -> None:
        """The end, wanted or not: nobody is left waiting."""
        with self._changed:
            self._closing = True
            self._error = error
            tasks, calls = list(self._tasks.values()), list(self._calls)
            self._orders.clear()
            self._calls.clear()
        if error:
            log.error("the engine stops: %s", error)
            if self._ranks is not None:
                self._ranks.close()  # so that the others notice, and nobody is waited for
            self._scheduler.tally.failed += len(tasks)
            for task in tasks:
                task.emit((), "", "error", error)
            self._scheduler.close()
            self._scheduler.give_up()
            self._cache.close(0.0)
        for future in calls:
            future.set_exception(UseAfterClose("the engine was closed before the call was done"))


def _silent(output: Output) -> None:
    """Tells nobody."""
