"""Blame: what an error ends, one request or the engine."""

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
"""Errors that are no single request's."""


class Blame:
    """Ends the request at which something failed, so that the others go on. Owner thread only.

    The engine ends all the same where going on could be wrong: the cache does not add up, the
    device answers no more, or an error is not there on all ranks.
    """

    def __init__(
        self,
        cache: Controller,
        runner: Runner,
        ranks: TensorRanks | None,
        tally: Tally,
        end: Callable[[Task, tuple[int, ...], str, str, str], None],
    ) -> None:
        """``end`` is the scheduler's: tokens, text, reason, and the error in words."""
        self._cache = cache
        self._runner = runner
        self._ranks = ranks
        self._tally = tally
        self._end = end

    @contextlib.contextmanager
    def on(self, task: Task) -> Iterator[None]:
        """What fails inside ends ``task``, and nothing else; raises as ``fail``."""
        try:
            yield
        except Exception as error:  # whatever it is: the others have nothing to do with it
            self.fail(task, error)

    def fail(self, task: Task, error: Exception) -> None:
        """Ends ``task``, at which ``error`` came.

        Raises:
            Whatever ``check`` raises.
            IntegrityError: the cache did not outlive the error.
        """
        self.check(error)
        log.error("request %s failed", task.request.request_id, exc_info=error)
        self._tally.failed += 1
        settle_loads(self._cache)  # that of its prefix may be under way
        what = f"this request failed in the engine: {type(error).__name__}: {error}"
        self._end(task, (), "", "error", what)
        self._cache.check_integrity()

    def check(self, error: Exception) -> None:
        """Returns if ``error`` may be one request's; every rank that met it must come here.

        Raises:
            The error itself, if it is none of a request's.
            RankLost: another rank has no error at this point: they can no longer go on together.
            RuntimeError: the device answers no more.
        """
        if isinstance(error, OF_THE_ENGINE):
            raise error
        if self._ranks is not None:
            self._ranks.meet()
        self._runner.check_device()
