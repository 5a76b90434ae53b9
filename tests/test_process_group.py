"""What several processes tell each other: rows, values of the main one, and that one of them is gone."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from metr.errors import ConfigError
from metr.process_group import PATIENCE, from_main, gathered, joined_device
from two_processes import launch, launched

EXCHANGES = """
import torch
import metr.process_group as group
from metr.processes import process_index
from metr.evaluation.results import EvaluationReport

rank = process_index()
assert group.joined_device("cpu") == group.joined_device("cpu") == torch.device("cpu")
for piece in (8, 64, 1 << 24):  # rows go in several pieces, or in one
    group._PIECE = piece
    for lengths in ((5, 3), (0, 7), (1, 0), (0, 0)):
        for dtype in (torch.float32, torch.int64):
            shares = [torch.arange(2 * length, dtype=dtype).reshape(-1, 2) + 100 * length for length in lengths]
            got = group.gathered(shares[rank])
            assert torch.equal(got, torch.cat(shares) if rank == 0 else shares[0][:0]), (piece, lengths)
            flat = group.gathered(shares[rank][:, 0])
            assert flat.shape == ((sum(lengths),) if rank == 0 else (0,))
asked = []
for value in (EvaluationReport(datasets=(), names=3), None):
    assert group.from_main(lambda: asked.append(1) or value, EvaluationReport | None) == value
assert len(asked) == (2 if rank == 0 else 0)
"""
LEFT = """
import atexit
import sys
from torch import distributed
atexit.register(lambda: open(f"{sys.argv[1]}/{rank}", "w").write(str(distributed.is_initialized())))
import metr.process_group as group
from metr.processes import process_index
rank = process_index()
group.joined_device("cpu")
group.joined_device("cpu")
assert distributed.is_initialized()
"""
LOST = """
import os
import metr.process_group as group
from metr.processes import process_index
group.joined_device("cpu")
if process_index() == 1:
    os._exit(3)
group.from_main(lambda: "nobody listens", str)
group.from_main(lambda: "nobody listens", str)
"""
STOPPED = """
import os, signal, threading, time
import metr.process_group as group
from metr.processes import process_index
from metr.training.signals import Abandoned, StopSignals
group.joined_device("cpu")
began = time.monotonic()
with StopSignals() as signals:
    try:
        with signals.leaving_at_once():
            if process_index() == 1:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            group.from_main(lambda: time.sleep(20), None)
        assert process_index() == 0
    except Abandoned:
        assert process_index() == 1
        assert time.monotonic() - began < 10, "it does not wait for the main process"
        os._exit(0)
    except group.MetrError:
        os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_exchange_rows_and_values(tmp_path: Path) -> None:
    launched(EXCHANGES, tmp_path)


@pytest.mark.slow
def test_a_process_leaves_the_group_before_it_ends(tmp_path: Path) -> None:
    launched(LEFT, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["False", "False"]


@pytest.mark.slow
def test_a_lost_process_is_named_and_not_waited_for(tmp_path: Path) -> None:
    (code, said), (other, _) = launch(LOST, tmp_path)
    assert (code, other) == (1, 3)
    assert (
        said.rstrip()
        .splitlines()[-2]
        .endswith("MetrError: another process of this run has ended, or cannot be reached; this one ends too")
    )


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_another_process(tmp_path: Path) -> None:
    launched(STOPPED, tmp_path)


def test_a_single_process_has_what_it_is_given() -> None:
    rows = torch.rand(3, 2)
    assert gathered(rows) is rows
    assert from_main(lambda: rows, None) is rows, "nothing is packed"
    assert joined_device("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError, match="no device 'nonsense'"):
        joined_device("nonsense")


def test_waiting_has_an_end() -> None:
    assert timedelta(minutes=30) <= PATIENCE <= timedelta(hours=3)
