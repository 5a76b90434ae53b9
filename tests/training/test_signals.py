"""Ctrl-C: the first asks, the second is obeyed at once."""

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
