"""Signals that ask to end (Ctrl-C, SIGTERM, SIGHUP): training ends after the current step, everything else at once."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = tuple(
    signal.Signals(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
REPEATED = 1.0
"""Seconds within which a second signal is the same request. `timeout` and `accelerate launch` signal a process twice:
once by its number, once with its whole group."""
_LEAVING = 1.0  # seconds that the listener has to end
_logger = logging.getLogger(__name__)


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
    another thread this does nothing. Entered inside another one, it hands on what it received when it is left: the
    signal that `timeout` repeats may come when training has already saved.

    Args:
        announced: Log at once what the first signal brings about, also while torch is deep in a long computation.
    """

    _innermost: "StopSignals | None" = None

    def __init__(self, *, announced: bool = False) -> None:
        self.requested = False
        self.number: int | None = None
        self._announced = announced
        self._at_once = False
        self._received = 0.0
        self._heard: float | None = None  # when the listener heard of the first signal
        self._insisted = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._enclosing: StopSignals | None = None
        self._listener: _Listener | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heeded}
            self._enclosing, StopSignals._innermost = StopSignals._innermost, self
            if self._announced:
                self._listener = _Listener(self._hear)
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
        if self.requested and now - self._received < REPEATED and not self._insisted:
            return
        self._received = now
        if self.requested or self._insisted:
            self._restore()
            raise Stopped(number)
        self.requested, self.number = True, number
        if self._at_once:
            raise Abandoned(number)

    def _hear(self, number: int) -> None:
        """Announces the first signal; runs in the listener's thread, perhaps long before `_receive` can.

        Python calls `_receive` between two of its own instructions, and a backward pass is a single one. Of several
        signals meanwhile it learns once; hence a second request is noted here.
        """
        if number not in self._before:
            return
        now = time.monotonic()
        if self._heard is None:
            self._heard = now
            _logger.warning("%s", _announcement(number, self._at_once))
        elif now - self._heard >= REPEATED:
            self._insisted = True

    def _receive_in_child(self, number: int) -> None:
        """Handles signals in forked processes, which inherit the handler: ignores SIGINT, obeys the others."""
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if StopSignals._innermost is self:
            StopSignals._innermost = self._enclosing
            if self.requested and self._enclosing is not None:
                self._enclosing._take_over(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _take_over(self, inner: "StopSignals") -> None:
        self.requested, self.number, self._received = True, inner.number, inner._received


class _Listener:
    """Hears of signals in a thread, as soon as they arrive: Python writes the number of each into a socket.

    Args:
        hear: Called in the thread with the number of each signal that Python handles.
    """

    active: "_Listener | None" = None

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear = hear
        self._numbers, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        _Listener.active = self

    def _listen(self) -> None:
        while True:
            for number in self._numbers.recv(64) or b"\0":
                if number == 0:
                    return
                self._hear(number)

    def close(self) -> None:
        """Ends the thread, after it has heard of what came before."""
        signal.set_wakeup_fd(self._before)
        _Listener.active = None
        self._writer.send(b"\0")  # closing would not do: forked processes hold copies of the socket
        self._thread.join(_LEAVING)  # the caller may be a signal's handler that keeps the log's lock
        if not self._thread.is_alive():
            self._writer.close()
            self._numbers.close()


def _announcement(number: int, at_once: bool) -> str:
    """What a first signal brings about, and what a second one would."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    if at_once:
        return f"{name}: stopping the evaluation; training up to here is saved"
    again = "press again to stop" if number == signal.SIGINT else "a second signal stops"
    return f"{name}: finishing this step, then saving; {again} without saving"


def _keep_signals_of_children() -> None:
    """In a forked process: its signals are not those of the process whose listener it has a copy of."""
    if _Listener.active is not None:
        _Listener.active = None
        with suppress(ValueError):  # forked by another thread than the main one
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_signals_of_children)
