"""Shields steps from signals, such as Ctrl-C in the middle of a change."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

_Handler = Callable[[int, FrameType | None], object]


# Those by which people and timers stop a program; a handler of another one hardly ever raises.
_SIGNALS = tuple(
    number
    for name in ("INT", "TERM", "HUP", "QUIT", "ALRM", "VTALRM", "PROF", "USR1", "USR2")
    if (number := getattr(signal, f"SIG{name}", None)) is not None
)


class _Shield:
    """Delays signals while it is held; their handlers run, and may raise, when it is released.

    Only handlers in Python can raise, and they run only on the main thread, so on other threads
    this does nothing. It costs some ten microseconds. The guarded step must end by itself.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._handlers: dict[int, _Handler] = {}
        self._waiting: list[int] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._depth == 0:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and handler != self._hold:
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._depth > 1:
            self._depth -= 1
            return
        self._depth = 0  # from here on a signal may end this; what is left in place passes it on
        try:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        finally:
            while self._waiting:
                number = self._waiting.pop(0)
                self._handlers[number](number, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._depth:
            self._waiting.append(number)
        else:
            self._handlers[number](number, frame)


shield = _Shield()
"""``with shield:`` around a step; the process has one, as it has one main thread."""
