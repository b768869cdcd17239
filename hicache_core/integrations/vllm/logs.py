"""HiCache's lines in vLLM's log; imports no vLLM."""

from __future__ import annotations

import logging

from hicache_core.process.logs import ROOT


def log_where_vllm_does() -> None:
    """Sends HiCache's records to the handlers of vLLM's logger, from its level on.

    vLLM sets up its own logger only, so without this nobody would see ours. Does nothing if the
    program has set up HiCache's logger or the root logger, or if vLLM does not log.
    """
    ours, vllm = logging.getLogger(ROOT), logging.getLogger("vllm")
    handlers = [*ours.handlers, *logging.getLogger().handlers]
    if any(not isinstance(handler, logging.NullHandler) for handler in handlers):
        return
    for handler in vllm.handlers:
        ours.addHandler(handler)
    if ours.level == logging.NOTSET:
        ours.setLevel(vllm.level)
