"""What identifies the models of LMCache's keys, found without blocking LMCache's threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from hicache_core.errors import HiCacheError
from hicache_core.integrations.foreign.identity import BY_NAME, model_identity


class Models:
    """Finds the identity of each model once. Any thread.

    A model that lies in a local folder is identified by its weights, which takes a while.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hicache-models")

    def identity(self, name: str) -> str:
        """Returns ``model_identity`` of a name. Blocks the first time."""
        known = self._known.get(name)
        if known is None:
            try:
                known = model_identity(name)
            except (OSError, HiCacheError):  # a folder that cannot be read: its name must do
                known = BY_NAME + name
            self._known[name] = known
        return known

    def run(self, names: Iterable[str], task: Callable[[], None]) -> None:
        """Runs a task that needs ``identity`` of some names.

        It runs here if they are known; if not, later, on the thread that finds them.

        Args:
            names: the models.
            task: must not raise.

        Raises:
            RuntimeError: this is closed, and not all are known.
        """
        if self._known.keys() >= set(names):
            task()
        else:
            self._thread.submit(task)

    def close(self) -> None:
        """Ends the thread after the task that it runs; others that wait do not run."""
        self._thread.shutdown(wait=False, cancel_futures=True)
