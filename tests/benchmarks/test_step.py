"""The benchmark of a step runs, and its numbers belong together."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = "--size 64 --repeats 1 --layers 1 --backbone resnet18 --names 7 --queries 20 --feed-forward 32 --threads 1"


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    assert step.main([*TINY.split(), "--device", "cpu", "--results", str(tmp_path)]) == 0
    assert "Deformable DETR" in capsys.readouterr().out
    return json.loads((tmp_path / "step-cpu.json").read_text())


def test_step_writes_ratios_parts_and_bars(result: dict) -> None:
    assert {"hardware", "torch", "transformers", "commit", "settings", "denoising"} <= result.keys()
    assert set(result["bars"]) == {"training_ratio", "inference_ratio", "matching_share"}
    for bar in result["bars"].values():
        assert bar["met"] == (bar["value"] <= bar["bar"])
    for what in ("training", "inference"):
        seconds = result["seconds"][what]
        # one counted round: its ratio is that of the times
        ratio = seconds["METR"] / seconds["Deformable DETR"]
        assert result["bars"][f"{what}_ratio"]["value"] == pytest.approx(ratio)
        assert [len(values) for values in result["rounds"][what].values()] == [1] * len(seconds)
    parts = result["parts"]
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert all(part["seconds"] > 0 for part in parts.values())
    assert parts["matching"]["share"] == result["bars"]["matching_share"]["value"]


def test_step_refuses_a_device_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import torch

    import step

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.main([*TINY.split(), "--device", "cuda", "--results", str(tmp_path)]) == 1
    assert "--device" in capsys.readouterr().out
