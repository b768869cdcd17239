"""Overrides settings of a model that would disturb a turn, and restores them after it."""

from __future__ import annotations

import logging
from typing import Any

from hicache_core.process.logs import log_once

log = logging.getLogger(__name__)


class Overrides:
    """The settings about caches in a model's configurations, and state of its last call."""

    def __init__(self, model: Any) -> None:
        """Changes nothing yet."""
        self._model = model
        self._undo: list[tuple[Any, str, object]] = []
        # Qwen-VL and its kin keep there how far the last picture moved the text behind it.
        self._with_offset = [module for module in model.modules() if hasattr(module, _OFFSET)]

    def apply(self) -> None:
        """Sets a saved ``use_cache: false`` to true and ``cache_implementation`` to none."""
        generation = getattr(self._model, "generation_config", None)
        config = self._model.config
        for settings in (generation, config, config.get_text_config()):
            if getattr(settings, "use_cache", None) is False:
                self._set(settings, "use_cache", True)
        if getattr(generation, "cache_implementation", None) is not None:
            self._set(generation, "cache_implementation", None)
        for module in self._with_offset:
            setattr(module, _OFFSET, None)

    def undo(self) -> None:
        """Restores what ``apply`` changed; a second call does nothing."""
        while self._undo:
            settings, name, value = self._undo.pop()
            setattr(settings, name, value)

    def _set(self, settings: Any, name: str, value: object) -> None:
        asked = getattr(settings, name)
        message = f"{name} = {asked!r} in the model's configuration is ignored: HiCache caches"
        log_once(log, logging.WARNING, message)
        self._undo.append((settings, name, asked))
        setattr(settings, name, value)


_OFFSET = "rope_deltas"
