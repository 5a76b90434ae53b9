"""Ctrl-C during training: the first ends it after the current step, the second at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Abandoned(KeyboardInterrupt):
    """The first signal came inside a block that may be left at once."""


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; the second interrupts the program at once.

    Python delivers signals to the main thread alone: in another thread this does nothing.
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

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """In this block the first signal raises `Abandoned`. For long blocks that can be repeated after resuming."""
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
        """Handles signals in data-loading workers, which inherit the handler: ignores SIGINT, obeys SIGTERM."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
