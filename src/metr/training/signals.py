"""Signals that ask to end (Ctrl-C, SIGTERM, SIGHUP): training ends after the current step, everything else at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = tuple(
    signal.Signals(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
REPEATED = 1.0
"""Seconds within which a second signal is the same request. `timeout` and `accelerate launch` signal a process twice:
once by its number, once with its whole group."""


class Stopped(KeyboardInterrupt):
    """A signal ended the program. Its `exit_code` is the one by which shells and schedulers tell."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 and the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


class Abandoned(Stopped):
    """The first signal came inside a block that may be left at once."""


class StopSignals:
    """While entered, the first signal only sets `requested` and `number`; a later one raises `Stopped` at once.

    A signal that is ignored stays so, as SIGHUP under `nohup`. Python delivers signals to the main thread alone: in
    another thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number: int | None = None
        self._at_once = False
        self._received = 0.0
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """In this block the first signal raises `Abandoned`, as does one that came before it.

        For long blocks that can be repeated after resuming.
        """
        self._at_once = True
        try:
            if self.number is not None:
                raise Abandoned(self.number)
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._receive_in_child(number)
            return
        now = time.monotonic()
        if self.requested and now - self._received < REPEATED:
            return
        self._received = now
        if self.requested:
            self._restore()
            raise Stopped(number)
        self.requested, self.number = True, number
        if self._at_once:
            raise Abandoned(number)

    def _receive_in_child(self, number: int) -> None:
        """Handles signals in forked processes, which inherit the handler: ignores SIGINT, obeys the others."""
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
