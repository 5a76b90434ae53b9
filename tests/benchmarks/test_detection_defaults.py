"""The study of detection's settings at a tiny scale."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from metr.data.joint import open_joint
from metr.data.records import InMemoryAnnotations

from tiny import TinyRun


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("detection_defaults")


def test_every_setting_is_measured(study: ModuleType, tiny_run: TinyRun, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_run.datasets[0].parent, data)
    shutil.copytree(tiny_run.datasets[0], data / "strange")
    arguments = ["--run", str(tiny_run.best), "--data", str(data), "--untrained", "strange", "--resamples", "2"]
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert study.main([*arguments, *folders]) == 0
    result = json.loads((tmp_path / "results/detection-defaults.json").read_text())
    assert list(result["ways"]) == list(study.SETTINGS)
    assert {"hardware", "torch", "commit"} <= result.keys()
    first = next(iter(result["ways"].values()))
    assert first["difference"] == {key: {"mean": 0.0, "low": 0.0, "high": 0.0} for key in ("own", "joint")}
    for figures in result["ways"].values():
        assert set(study.QUESTIONS) <= figures.keys()
        assert set(figures["datasets"]["own"]) == {"pond", "desk", "meadow"}
        assert figures["difference"]["own"]["mean"] == pytest.approx((figures["own"] or 0) - (first["own"] or 0))
    assert result["commit"] in (tmp_path / "results/detection-defaults.md").read_text()


def test_images_are_drawn_with_what_was_found_in_them(study: ModuleType, tiny_run: TinyRun) -> None:
    (annotations,) = open_joint(tiny_run.data[:1]).evaluation().values()
    whole = InMemoryAnnotations(
        name="pond",
        split="val",
        categories=tuple(annotations.categories),
        records=tuple(annotations[index] for index in range(len(annotations))),
    )
    rows = np.array([2, 0, 2])
    drawn = study.redrawn(whole, rows)
    assert [record.image_id for record in drawn.records] == [0, 1, 2]
    assert [record.path for record in drawn.records] == [whole.records[row].path for row in rows]
    found = {record.image_id: number for number, record in enumerate(whole.records)}
    assert dict(study.relabelled(whole, rows, found)) == {0: 2, 1: 0, 2: 2}


def test_fields_that_share_words_are_alike(study: ModuleType) -> None:
    assert study.alike(("black-queen", "white-pawn"), ("Queen", "ace"))
    assert not study.alike(("fish", "shark"), ("queen", "ace"))


def test_a_difference_has_a_span(study: ModuleType) -> None:
    before = np.array([50.0, 49.0, 51.0, 50.0])
    found = study.difference(before, before + np.array([2.0, 1.0, 3.0, 2.0]))
    assert found["mean"] == 2
    assert 1 <= found["low"] < 2 < found["high"] <= 3
