"""Ctrl-C: the first asks, the second is obeyed at once."""

import functools
import hashlib
import os
import signal
import sys
import threading
import time

import pytest

from metr.training import signals
from metr.training.signals import Abandoned, Stopped, StopSignals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every signal is a request of its own."""
    monkeypatch.setattr(signals, "REPEATED", 0.0)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("patient")
def test_the_first_only_asks_and_the_second_ends(number: signal.Signals) -> None:
    with StopSignals() as interrupts:
        assert not interrupts.requested
        signal.raise_signal(number)
        assert interrupts.requested
        assert interrupts.number == number
        with pytest.raises(KeyboardInterrupt, match=f"stopped by {number.name}") as caught:
            signal.raise_signal(number)
        assert caught.type is Stopped
        assert caught.value.exit_code == 128 + number


def test_the_same_request_comes_twice() -> None:
    """`timeout` signals the process, then its group, which it is in."""
    with StopSignals() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.number == signal.SIGTERM


def test_the_same_request_comes_again_after_training_has_obeyed_it() -> None:
    """Around training, the command line has signals of its own, by which a verb is left at once."""
    with StopSignals() as outer, outer.leaving_at_once():
        with StopSignals() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert not outer.requested
        signal.raise_signal(signal.SIGTERM)
        assert (inner.number, outer.number) == (signal.SIGTERM, signal.SIGTERM)
    with StopSignals() as outer, outer.leaving_at_once():
        with StopSignals():
            pass
        with pytest.raises(Abandoned):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("patient")
def test_a_later_request_ends_what_follows_training() -> None:
    with StopSignals() as outer, outer.leaving_at_once():
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_block_may_be_left_at_once() -> None:
    with StopSignals() as interrupts:
        with pytest.raises(Abandoned), interrupts.leaving_at_once():
            signal.raise_signal(signal.SIGINT)
        assert interrupts.requested
    with StopSignals() as interrupts:
        with interrupts.leaving_at_once():
            pass
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested, "after the block it only asks again"


def test_other_threads_get_along_without_signals() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with StopSignals() as interrupts:
            found.append(interrupts.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_ignore_ctrl_c_and_can_be_terminated() -> None:
    with StopSignals() as interrupts:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        try:
            os.kill(child, signal.SIGINT)
            os.kill(child, signal.SIGINT)
            time.sleep(0.05)
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "Ctrl-C is its parent's to handle"
        finally:
            os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert not interrupts.requested


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals within a fifth of a second are one request."""
    monkeypatch.setattr(signals, "REPEATED", 0.2)


def hashed(times: int) -> float:
    """Hashes in one instruction of Python that lets other threads run, and gives the seconds that it took."""
    start = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"long", b"call", times)
    return time.perf_counter() - start


@functools.cache
def times_a_second() -> int:
    """How often this processor hashes in a second, by the fastest of five tries."""
    return int(20_000 / min(hashed(20_000) for _ in range(5)))


def long_call() -> float:
    """One instruction of Python that takes more than a second, as a backward pass of torch may.

    Gives the time when it ended.
    """
    # a processor that other work slowed while it was timed may be twice as fast now
    assert hashed(int(2.5 * times_a_second())) > 1.0
    return time.time()


def signal_after(seconds: float, number: signal.Signals, times: int = 1) -> None:
    """Sends a signal to this process while it does something else."""
    threading.Timer(seconds, lambda: [os.kill(os.getpid(), number) for _ in range(times)]).start()


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, "Ctrl-C: finishing this step, then saving; press again to stop without saving"),
        (signal.SIGTERM, "SIGTERM: finishing this step, then saving; a second signal stops without saving"),
    ],
)
def test_what_follows_is_said_at_once_even_in_a_long_step(
    number: signal.Signals, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with StopSignals(announced=True) as interrupts:
        signal_after(0.1, number, times=3)
        ended = long_call()
        assert interrupts.requested
    assert [record.getMessage() for record in caplog.records] == [told]
    assert caplog.records[0].created < ended - 0.1, "before the step was over"


@pytest.mark.usefixtures("impatient")
def test_pressed_twice_in_one_long_step_it_stops_as_soon_as_it_can() -> None:
    with StopSignals(announced=True):
        signal_after(0.1, signal.SIGINT)
        signal_after(0.4, signal.SIGINT)
        with pytest.raises(Stopped, match="stopped by SIGINT"):
            long_call()


def test_in_an_evaluation_it_is_said_that_this_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with StopSignals(announced=True) as interrupts:
        signal_after(0.1, signal.SIGINT)
        with pytest.raises(Abandoned), interrupts.leaving_at_once():
            long_call()
    (record,) = caplog.records
    assert record.getMessage() == "Ctrl-C: stopping the evaluation; training up to here is saved"


def test_what_comes_last_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    with StopSignals(announced=True):
        signal.raise_signal(signal.SIGINT)
    assert len(caplog.records) == 1


def test_nothing_is_said_where_that_is_not_wanted(caplog: pytest.LogCaptureFixture) -> None:
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
    assert not caplog.records


def test_the_listener_leaves_nothing_behind() -> None:
    def state() -> tuple[int, set[str]]:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return wakeup, {thread.name for thread in threading.enumerate()}

    before = state()
    with StopSignals(announced=True):
        assert state() != before
    assert state() == before
    with StopSignals(announced=True) as interrupts:
        signal.raise_signal(signal.SIGINT)
        interrupts._received -= 2 * signals.REPEATED
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
    assert state() == before


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_signals_of_workers_are_not_announced(caplog: pytest.LogCaptureFixture) -> None:
    with StopSignals(announced=True) as interrupts:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        time.sleep(0.1)
        assert not interrupts.requested
    assert not caplog.records
