"""Blame: decides whether an error ends one request or the engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from hicache_core.controller.controller import Controller
from hicache_core.engine.loads import settle_loads
from hicache_core.engine.runner import Runner
from hicache_core.engine.tally import Tally
from hicache_core.engine.task import Task
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.errors import IntegrityError, RankLost, UseAfterClose

log = logging.getLogger(__name__)

OF_THE_ENGINE = (IntegrityError, RankLost, UseAfterClose)
"""Errors that concern the whole engine."""


class Blame:
    """Ends the request at which something failed, so that the others go on. Owner thread only.

    The engine itself ends where going on could give wrong results: the cache is inconsistent, the
    device no longer answers, or only some of the ranks met the error.
    """

    def __init__(
        self,
        cache: Controller,
        runner: Runner,
        ranks: TensorRanks | None,
        tally: Tally,
        end: Callable[[Task, tuple[int, ...], str, str, str], None],
    ) -> None:
        """Keeps its arguments.

        Args:
            cache: checked after each error.
            runner: says whether the device still answers.
            ranks: who computes the model together; None for this process alone.
            tally: counts the requests that failed.
            end: ends a request with its last tokens, text, finish reason and error message.
        """
        self._cache = cache
        self._runner = runner
        self._ranks = ranks
        self._tally = tally
        self._end = end

    @contextlib.contextmanager
    def on(self, task: Task) -> Iterator[None]:
        """An exception inside the block ends ``task`` and nothing else; raises as ``fail``."""
        try:
            yield
        except Exception as error:  # whatever it is: the others have nothing to do with it
            self.fail(task, error)

    def fail(self, task: Task, error: Exception) -> None:
        """Ends ``task`` because of ``error``.

        Raises:
            Whatever ``check`` raises.
            IntegrityError: the cache is inconsistent after the error.
        """
        self.check(error)
        log.error("request %s failed", task.request.request_id, exc_info=error)
        self._tally.failed += 1
        settle_loads(self._cache)  # the load of its prefix may still run
        what = f"this request failed in the engine: {type(error).__name__}: {error}"
        self._end(task, (), "", "error", what)
        self._cache.check_integrity()

    def check(self, error: Exception) -> None:
        """Returns if ``error`` concerns one request only; every rank that met it calls this.

        Raises:
            The error itself, if it concerns the engine.
            RankLost: another rank did not meet the error, so the ranks are no longer in step.
            RuntimeError: the device no longer answers.
        """
        if isinstance(error, OF_THE_ENGINE):
            raise error
        if self._ranks is not None:
            self._ranks.meet()
        self._runner.check_device()
