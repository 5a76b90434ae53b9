"""The speed of adopted detectors: both trainings run, on the same images, and published detectors are what they are."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForObjectDetection

from tiny import TinyRun, as_overrides


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("adopted_speed")


@pytest.mark.slow
def test_both_arms_train_and_a_page_tells_them(study: ModuleType, tiny_run: TinyRun, tmp_path: Path) -> None:
    places = {"data": tiny_run.datasets[0].parent, "out": tmp_path / "runs", "results": tmp_path / "results"}
    given = ["--profile", "tiny", *(part for name, path in places.items() for part in (f"--{name}", str(path)))]
    given += [part for one in as_overrides(tiny_run) if one.startswith("loader") for part in ("--set", one)]
    assert study.main(given) == 0
    result = json.loads((tmp_path / "results/adopted-speed-tiny.json").read_text(), parse_constant=pytest.fail)
    assert result["complete"]
    assert [one["arm"] for one in result["runs"]] == list(study.ARMS)
    assert all(one["images_per_second"] > 0 for one in result["runs"])
    theirs, ours = result["runs"]
    assert theirs["names"] == ours["names"] > 1
    metr = json.loads((tmp_path / "runs/RT-DETR/metr/run/metrics.jsonl").read_text().splitlines()[0])
    assert (metr["step"], metr["images"]) == (1, 2), "the first steps end with the first record"
    theirs |= {"images_per_second": 40.0}
    ours |= {"images_per_second": 30.0, "memory_gib": 2.0}
    assert "| 40.0 | 30.0 | 0.75 | - | 2.0 |" in study.page(result)
    assert "| 40.0 | - | - | - | - |" in study.page({**result, "runs": [theirs]})


# what their authors publish: millions of parameters, of detectors of 80 and 90 classes
PARAMETERS = {"D-FINE-N": 3.8, "RF-DETR-N": 30.5}


@pytest.mark.parametrize("profile", ["trial", "gpu"])
def test_the_detectors_have_the_size_that_is_published(study: ModuleType, profile: str) -> None:
    whole = study.Study(name="adopted-speed", profile=profile, data=Path(), out=Path())
    asked: Any = study.Profile.checked(whole.read_profile())
    for name, published in asked.detectors.items():
        config = AutoConfig.for_model(published.detector, **published.options, num_labels=80)
        with torch.device("meta"):
            network: Any = AutoModelForObjectDetection
            count = sum(one.numel() for one in network.from_config(config).parameters())
        assert count / 1e6 == pytest.approx(PARAMETERS[name], rel=0.06), name
