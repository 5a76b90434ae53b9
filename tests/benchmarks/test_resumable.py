"""What the benchmarks of hours have in common: they stop by themselves, and say how they ended."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console


@pytest.fixture
def resumable(benchmark_of: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_of("resumable")


def test_it_stops_by_itself(resumable: ModuleType) -> None:
    assert not resumable.done_within(0.003, lambda: time.sleep(20) or True)
    with pytest.raises(KeyboardInterrupt), resumable.stopping_after(0.003):
        time.sleep(20)
    with resumable.stopping_after(0.003):
        pass
    time.sleep(0.3)  # the timer is off
    assert resumable.done_within(None, lambda: True)


def test_the_exit_status_says_how_it_ended(resumable: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Console) -> bool:
        raise KeyboardInterrupt

    assert resumable.exit_status(lambda _: True) == 0
    assert capsys.readouterr().out == ""
    for work in (lambda _: False, interrupted):
        assert resumable.exit_status(work) == 130
        assert "not done yet; to go on, give the same command again" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["multifield", "rehearsal", "transfer", "transfer_detectors"])
def test_missing_datasets_are_named(
    benchmark_of: Callable[[str], ModuleType], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    present = {"aquarium", "chess_pieces", "coco_mini", "doc_tables", "endangered_animals", "playing_cards"}
    for dataset in present:
        (tmp_path / dataset).mkdir()
    assert benchmark_of(name).main(["--data", str(tmp_path), "--out", str(tmp_path / "runs")]) == 1
    assert "expected the datasets bccd\n" in capsys.readouterr().out


def test_seconds_are_those_of_the_last_step(resumable: ModuleType, tmp_path: Path) -> None:
    assert resumable.training_seconds(tmp_path) == 0
    records = [{"kind": "train", "step": step, "seconds": 1.5 * step} for step in (1, 2)]
    records.append({"kind": "evaluation", "step": 2, "evaluation_seconds": 9.0})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    assert resumable.training_seconds(tmp_path) == resumable.training_seconds(tmp_path / "metrics.jsonl") == 3
