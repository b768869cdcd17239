"""Logging: quiet by default, and what is said once is said once."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from hicache_core.process.logs import MAX_SAID, forget_logged, log_once


def test_a_message_is_logged_once_and_again_after_forgetting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forget_logged()
    logger = logging.getLogger("hicache_core.test")
    with caplog.at_level(logging.WARNING, "hicache_core"):
        for _ in range(3):
            log_once(logger, logging.WARNING, "100 % sure")
        assert caplog.messages == ["100 % sure"]
        forget_logged()
        log_once(logger, logging.WARNING, "100 % sure")
    assert len(caplog.messages) == 2
    forget_logged()


def test_a_message_below_the_level_does_not_count_as_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("hicache_core.test")
    with caplog.at_level(logging.WARNING, "hicache_core"):
        log_once(logger, logging.INFO, "later")
    with caplog.at_level(logging.INFO, "hicache_core"):
        log_once(logger, logging.INFO, "later")
    assert caplog.messages == ["later"]
    forget_logged()


def test_of_very_many_messages_the_oldest_may_be_said_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forget_logged()
    logger = logging.getLogger("hicache_core.test")
    with caplog.at_level(logging.INFO, "hicache_core"):
        for n in [*range(MAX_SAID + 1), MAX_SAID, 1, 0]:
            log_once(logger, logging.INFO, str(n))
    assert caplog.messages == [str(n) for n in [*range(MAX_SAID + 1), 0]]
    forget_logged()


def test_without_handlers_nothing_is_printed() -> None:
    code = (
        "from hicache_core.config.settings import HiCacheConfig;"
        "HiCacheConfig(hicache_io_backend='direct', hicache_mem_layout='page_first').resolve()"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=True
    )
    assert child.stdout == child.stderr == b""
