"""Ctrl-C with manners: the first ends training after the step at hand, the second at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Abandoned(KeyboardInterrupt):
    """The first signal came inside a block that may be left at once."""


class StopSignals:
    """While entered, SIGINT and SIGTERM ask for an end instead of causing one; the second of them is obeyed at once.

    Only the main thread can catch signals: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """A block that the first signal leaves with `Abandoned`: long, and without anything to be saved."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._receive_in_child(number)
            return
        if self.requested:
            self._restore()
            raise KeyboardInterrupt
        self.requested = True
        if self._at_once:
            raise Abandoned

    def _receive_in_child(self, number: int) -> None:
        """Workers that load data inherit the handler: they leave Ctrl-C to their parent, but can be terminated."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
