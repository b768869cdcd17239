"""HiCache's lines in vLLM's log, on the standard library's loggers."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hicache_core.integrations.vllm.logs import log_where_vllm_does

NAMES = ("", "hicache_core", "vllm")


@contextmanager
def log_of_vllm() -> Iterator[io.StringIO]:
    """What vLLM logs; no other logger is set up, and all are put back.

    No fixture, as pytest sets up the root logger afterwards.
    """
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = [logging.NullHandler()]
    loggers[1].setLevel(logging.NOTSET)
    text = io.StringIO()
    loggers[2].handlers[:] = [logging.StreamHandler(text)]
    loggers[2].setLevel(logging.INFO)
    try:
        yield text
    finally:
        for logger, (handlers, level) in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(level)


def test_records_are_seen_once_from_the_level_of_vllm_on() -> None:
    with log_of_vllm() as vllm_log:
        for _ in range(2):
            log_where_vllm_does()
        logger = logging.getLogger("hicache_core.storage")
        logger.debug("too much")
        logger.info("a line")
    assert vllm_log.getvalue() == "a line\n"


@pytest.mark.parametrize("name", ["", "hicache_core"])
def test_a_logger_that_the_program_has_set_up_is_left_alone(name: str) -> None:
    own = io.StringIO()
    with log_of_vllm() as vllm_log:
        logging.getLogger(name).addHandler(logging.StreamHandler(own))
        log_where_vllm_does()
        logging.getLogger("hicache_core.storage").error("a line")
    assert own.getvalue() == "a line\n"
    assert vllm_log.getvalue() == ""
