"""Task: one request on its way through the scheduler, from arrival to its last output."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hicache_core.engine.detokenize import TextStream
from hicache_core.engine.logprobs import LogprobRecord
from hicache_core.engine.page_table import PageTable
from hicache_core.engine.request import CachedTokens, Output, Request, Times, TokenLogprobs
from hicache_core.engine.sampling import Sampler
from hicache_core.kv.keys import pack_tokens

OnOutput = Callable[[Output], None]

_NO_LOGPROBS: tuple[tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]] = ((), ())


class Task:
    """What the scheduler knows of a request. Owner thread only.

    ::

        tokens   | computed: KV in pages of the table | missing, at least one |
                 | prompt ............................ | answer .............. |

    Attributes:
        request: what was asked.
        table: its device pages; empty while it waits.
        tokens: prompt and answer so far.
        n_computed: leading tokens whose KV is in the pages.
        n_new_max: length of the answer at most.
        cached: what the caches had of the prompt when it was admitted.
        times: when things happened.
        may_load: False after a load failed: the next start computes everything.
        n_failed_loads: of the cache, when the request was matched.
        asked_storage: a prefetch is to be finished.
        was_preempted: its pages may have left the device since.
        logprobs: what the client wants to know of them; None for nothing.
        progressed_s: when it came, got pages, or some of its tokens were computed, the last time.
    """

    def __init__(
        self,
        request: Request,
        number: int,
        on_output: OnOutput,
        table: PageTable,
        sampler: Sampler,
        stream: TextStream,
    ) -> None:
        """Keeps its arguments.

        Args:
            request: what was asked.
            number: counts the requests in the order of their arrival.
            on_output: called with each output.
            table: the pages of the request, empty.
            sampler: chooses the tokens of the answer.
            stream: makes text of them.
        """
        self.request = request
        self.table = table
        self.tokens = array("I", request.tokens)
        self.n_computed = 0
        self.n_new_max = request.sampling.max_new_tokens
        self.cached = CachedTokens()
        self.times = Times()
        self.may_load = True
        self.n_failed_loads = 0
        self.asked_storage = False
        self.was_preempted = False
        wanted = request.logprobs
        self.logprobs = None if wanted is None else LogprobRecord(wanted, request.tokens)
        self.progressed_s = 0.0
        self._number = number
        self._on_output = on_output
        self._sampler = sampler
        self._stream = stream

    @property
    def order(self) -> tuple[int, int]:
        """Smaller ones are served first, and keep what they have."""
        return -self.request.priority, self._number

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.tokens)

    @property
    def n_new(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def n_missing(self) -> int:
        """Tokens to compute before the next one is known."""
        return len(self.tokens) - self.n_computed

    @property
    def n_reusable(self) -> int:
        """Leading tokens that may come from the caches: all, unless their logits are wanted."""
        n_tokens = len(self.tokens)
        return n_tokens if self.logprobs is None else self.logprobs.n_reusable(n_tokens)

    @property
    def n_loadable(self) -> int:
        """Leading tokens that are taken from the caches now; the last one is always computed."""
        return min(self.n_reusable, len(self.tokens) - 1) if self.may_load else 0

    def n_next(self, budget: int, n_computed: int | None = None) -> int:
        """Tokens of the next forward of its prompt: a snapshot of its state ends it earlier.

        Args:
            budget: tokens at most.
            n_computed: leading tokens that are computed; those of the table by default.
        """
        start = self.n_computed if n_computed is None else n_computed
        n_tokens = min(budget, len(self.tokens) - start)
        stop = self.table.units.next_stop(start)
        return n_tokens if stop is None else min(n_tokens, stop - start)

    @property
    def decodes(self) -> bool:
        """Whether its answer has begun, and only the last token of it is to be computed."""
        return self.n_new > 0 and self.n_missing == 1

    def packed(self, start: int, stop: int) -> bytes:
        """Tokens from ``start`` to ``stop``, as the cache takes them."""
        return pack_tokens(self.tokens[start:stop])

    def answer(self, token: int) -> tuple[str, str | None]:
        """Adds a token to the answer; the text that is certain now, and why the answer ends."""
        self.tokens.append(token)
        if self._sampler.is_end(token):
            return self._stream.finish(), "stop"
        may_stop = self.n_new >= self.request.sampling.min_new_tokens
        text, stopped = self._stream.push(token, may_stop=may_stop)
        if stopped:
            return text, "stop"
        if self.n_new == self.n_new_max:
            return text + self._stream.finish(), "length"
        return text, None

    @property
    def sampler(self) -> Sampler:
        """Chooses its tokens."""
        return self._sampler

    def emit(
        self, tokens: tuple[int, ...], text: str, finish_reason: str | None, error: str = ""
    ) -> None:
        """Sends an output to the client.

        Args:
            tokens: new since the last output.
            text: what they add.
            finish_reason: None while more is to come.
            error: what went wrong, for ``error``.
        """
        of_prompt, of_answer = _NO_LOGPROBS if self.logprobs is None else self.logprobs.taken()
        self._on_output(
            Output(
                request_id=self.request.request_id,
                new_tokens=tokens,
                text=text,
                finish_reason=finish_reason,
                error=error,
                prompt_tokens=self.n_prompt,
                completion_tokens=self.n_new,
                cached=self.cached,
                times=self.times,
                logprobs=of_answer,
                prompt_logprobs=of_prompt,
            )
        )

    def tell_by(self, through: Callable[[OnOutput, Output], None]) -> None:
        """Passes each output to ``through``, with the function that sends it to the client."""
        self._on_output = partial(through, self._on_output)

    def note(self, **times: float) -> None:
        """Sets the times that have not been set before."""
        new = {name: at for name, at in times.items() if not getattr(self.times, name)}
        self.times = replace(self.times, **new)
