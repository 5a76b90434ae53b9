"""The study of what is left of METR in another detector, at a tiny scale."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tiny import TinyRun


@pytest.mark.slow
def test_a_detector_is_made_and_judged_in_every_way(
    study_of: Callable[[str], ModuleType], tiny_run: TinyRun, tmp_path: Path
) -> None:
    study, data = study_of("taught"), tiny_run.datasets[0]
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--steps", "2"]
    places = ["--run", str(tiny_run.best), "--data", str(data.parent), "--datasets", data.name]
    assert study.main([*places, *folders]) == 0
    result = json.loads((tmp_path / "results/taught.json").read_text())
    (one,) = result["datasets"].values()
    assert list(one) == [study.SOURCE, *study.WAYS]
    for way in one.values():
        for judged in (way["as evaluated"], way["without suppression"]):
            assert judged["ap"] is None or 0 <= judged["ap"] <= 100
    assert len(result["bars"]) == 1
    page = (tmp_path / "results/taught.md").read_text()
    assert result["commit"] in page
    assert "taught for 2 steps" in page
