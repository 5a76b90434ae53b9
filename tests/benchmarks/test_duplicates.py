"""The study of duplicates in miniature, and its own counts."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.models.config import DetectorConfig
from metr.structures import Detections
from metr.training.config import load_recipe


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("duplicates")


def test_the_profile_is_whole(study: ModuleType) -> None:
    whole = study.Study(name="duplicates", profile="trial", data=Path(), out=Path())
    profile = study.Profile.checked(whole.read_profile())
    arms = profile.arms()
    assert list(arms) == ["recipe", *profile.cures, "together"]
    recipes = {arm: load_recipe("nano", changes=study.merge(profile.recipe, tree)) for arm, tree in arms.items()}
    assert len({recipe.model_dump_json() for recipe in recipes.values()}) == len(arms), "each arm is of its own"
    together: DetectorConfig = recipes["together"].model
    assert together.denoising.flip_noise == 1
    assert together.decoder.look_forward == "twice"
    assert together.queries.one_to_many.number == 100


def test_arms_are_compared_seed_by_seed(
    study: ModuleType,
    command_of: Callable[[ModuleType], Callable[..., int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = study.Study(name="duplicates", profile="trial", data=Path(), out=Path()).read_profile()
    profile |= {"datasets": ["bccd"], "seeds": [0, 1]}
    profile["recipe"]["loader"]["mixture"] = "equal"
    profile["cures"] = {"noise": profile["cures"]["noise of flipped copies"]}
    monkeypatch.setattr(study.Study, "read_profile", lambda _: profile)
    monkeypatch.setattr(study, "RESAMPLES", 1)
    assert command_of(study)("--set", "train.loop.steps=1") == 0
    result = json.loads((tmp_path / "results/duplicates-trial.json").read_text())
    assert result["complete"]
    assert list(result["arms"]) == ["recipe", "noise", "together"]
    assert result["arms"]["recipe"]["gains"] is None
    for arm in ("noise", "together"):
        one = result["arms"][arm]
        assert one["seeds"] == [0, 1]
        for figure in study.FIGURES:
            plain = np.mean(one["each"][figure]) - np.mean(result["arms"]["recipe"]["each"][figure])
            assert one["gains"][figure]["mean"] == pytest.approx(plain)
    assert result["arms"]["noise"]["each"] == result["arms"]["together"]["each"], "the same configuration"
    assert [one["what"] for one in result["bars"]] == list(result["arms"])
    assert "NMS adds" in (tmp_path / "results/duplicates-trial.md").read_text()


def test_repeats_are_counted_among_as_many_as_there_are_objects(study: ModuleType) -> None:
    boxes = [(0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (40.0, 0.0, 50.0, 10.0)]
    record = ImageRecord(
        image_id=1,
        path=Path("1.jpg"),
        width=60,
        height=20,
        boxes=np.array(boxes, dtype=np.float32),
        labels=np.array([0, 0, 1]),
        ignore=np.array([False, False, False]),
        areas=np.full(3, 100.0, dtype=np.float32),
    )
    truth = InMemoryAnnotations(name="farm", split="val", categories=("ant", "bee"), records=(record,))
    # the second repeats the first, the third is of another name there, and a fourth is one too many
    found = Detections(
        boxes=torch.tensor([boxes[0], (0.0, 0.0, 10.0, 9.0), boxes[0], boxes[0]]),
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6]),
        labels=torch.tensor([0, 0, 1, 0]),
        names=("ant", "bee"),
    )
    assert study.repeated(truth, {1: found}) == pytest.approx(100 / 3)
    nothing = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long(), names=("ant",))
    assert study.repeated(truth, {1: nothing}) is None
