"""An engine that says the prompt again: a real cache and no model. An emulation, for the routes."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any

import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.config import EngineStatus
from hicache_core.engine.request import CachedTokens, Output, Request, Times
from hicache_core.errors import QueueFull, UseAfterClose
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.types import Namespace

SPEC = KVSpec.mha(num_layers=1, num_heads=1, head_dim=2, dtype="float32", fingerprint="echo")
CONTEXT = 512


class EchoEngine:
    """Answers one request after the other with its own prompt, a token a step.

    While ``gate`` is closed, requests stay as they are.
    """

    def __init__(self, config: HiCacheConfig, tokenizer: Any, *, max_waiting: int = 8) -> None:
        pool = DevicePool(SPEC, config.page_size, 160, torch.device("cpu"))
        self.cache = HiCache(config, SPEC, pool)
        self.gate = threading.Event()
        self.gate.set()
        self.fails = ""
        self.aborted: set[str] = set()
        self.received: list[Request] = []
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._waiting = 0
        self._finished = 0
        self.stalled = ""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hicache-echo")
        self._thread.start()

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        if self._closed:
            raise UseAfterClose("closed")
        if self._waiting >= self._max_waiting:
            raise QueueFull(f"{self._waiting} requests wait already; try again later")
        self._waiting += 1
        self.received.append(request)
        self._work.put(lambda: self._answer(request, on_output))

    def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    def call_all(self, method: str, *arguments: object, timeout_s: float) -> Any:
        return self.call(lambda cache: getattr(cache, method)(*arguments), timeout_s)

    def call(self, work: Callable[[HiCache], Any], timeout_s: float) -> Any:
        done: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

        def run() -> None:
            try:
                done.put((work(self.cache), None))
            except Exception as error:
                done.put((None, error))

        self._work.put(run)
        try:
            value, error = done.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return value

    def namespace(self, namespace: Namespace) -> Namespace:
        return namespace

    def status(self) -> EngineStatus:
        return EngineStatus(
            waiting=self._waiting,
            running=0,
            n_slots=256,
            used_slots=0,
            tokens_per_s=0.0,
            prefill_tokens_per_s=0.0,
            finished=self._finished,
            aborted=len(self.aborted),
            failed=0,
            preempted=0,
            context_length=CONTEXT,
            error="" if not self._closed else "closed",
            stalled=self.stalled,
        )

    def close(self, timeout_s: float = 10.0) -> None:
        if self._closed:
            return
        self._closed = True
        self.gate.set()
        self._work.put(None)
        self._thread.join()
        self.cache.close(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                work = self._work.get(timeout=0.01)
            except queue.Empty:
                self.cache.poll()
                continue
            if work is None:
                return
            work()
            self.cache.poll()

    def _answer(self, request: Request, on_output: Callable[[Output], None]) -> None:
        while not self.gate.wait(0.002) and request.request_id not in self.aborted:
            pass
        self._waiting -= 1
        arrived = time.monotonic()
        cached = self._cached(request)
        n_new = min(request.sampling.max_new_tokens, CONTEXT - len(request.tokens))
        if not n_new:
            times = Times(arrived, arrived, 0.0, time.monotonic())
            name, n_prompt = request.request_id, len(request.tokens)
            on_output(Output(name, (), "", "length", "", n_prompt, 0, cached, times))
        for n, token in enumerate(itertools.islice(itertools.cycle(request.tokens), n_new), 1):
            reason = "length" if n == n_new else None
            if request.request_id in self.aborted:
                reason = "abort"
            elif self.fails:
                reason = "error"
            now = time.monotonic()
            on_output(
                Output(
                    request.request_id,
                    (token,),
                    self._tokenizer.decode([token]) + " ",
                    reason,
                    self.fails,
                    len(request.tokens),
                    n,
                    cached,
                    Times(arrived, arrived, now, now if reason else 0.0),
                )
            )
            if reason in ("abort", "error"):
                break
        self._finished += 1

    def _cached(self, request: Request) -> CachedTokens:
        """Takes the prompt through the cache, as an engine would."""
        cache, page_size = self.cache, self.cache.page_size
        tokens = pack_tokens(request.tokens)
        if cache.prefetch(request.request_id, tokens, request.namespace):
            while not cache.prefetch_ready(request.request_id):
                cache.poll()
        storage = cache.finish_prefetch(request.request_id)
        match = cache.match_prefix(tokens, request.namespace, request_id=request.request_id)
        cache.lock(match.node)
        loaded = cache.load_back(match)
        cache.wait_layer(0)
        n_pages = len(request.tokens) // page_size - len(loaded.device_pages)
        pages = loaded.device_pages + (cache.allocate(n_pages) if n_pages else array("i"))
        result = cache.insert(tokens, pages, request.namespace)
        cache.free(result.duplicates)
        cache.unlock(match.node)
        return CachedTokens(match.n_device_tokens, match.n_host_tokens - storage, storage)
