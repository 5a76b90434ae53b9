"""The study of calibrated scores at a tiny scale."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tiny import TinyRun


def test_scores_are_judged_on_images_that_did_not_calibrate_them(
    study_of: Callable[[str], ModuleType], tiny_run: TinyRun, tmp_path: Path
) -> None:
    study = study_of("calibration")
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--cuts", "1"]
    assert study.main(["--run", str(tiny_run.best), "--data", str(tiny_run.datasets[0].parent), *folders]) == 0
    result = json.loads((tmp_path / "results/calibration.json").read_text())
    assert set(result["datasets"]) == {path.name for path in tiny_run.datasets}
    for one in result["datasets"].values():
        for side in ("raw", "calibrated"):
            assert 0 <= one[side]["error"] <= 1
            assert all(0 <= one[side][key] <= 100 for key in ("precision", "recall", "f1", "best"))
    assert len(result["bars"]) == len(result["datasets"])
    page = (tmp_path / "results/calibration.md").read_text()
    assert "best F1" in page
    assert result["commit"] in page
