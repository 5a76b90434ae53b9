"""The study of duplicates in miniature, and its own counts."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from metr.config import read_yaml
from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.model import METR
from metr.models.config import DetectorConfig
from metr.structures import Detections
from metr.training.config import load_recipe


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("duplicates")


def same_weights(first: METR, second: METR) -> bool:
    ours, theirs = first.network.state_dict(), second.network.state_dict()
    return all(torch.allclose(value, theirs[key], rtol=1e-4, atol=1e-6) for key, value in ours.items())


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
    assert recipes["together"].train.ema.batch_norm_images == 96
    # one run an arm and seed, the first seed of all arms first; each arm sees the same images
    assert len({recipe.train.loop.model_dump_json() for recipe in recipes.values()}) == 1
    assert len({recipe.loader.model_dump_json() for recipe in recipes.values()}) == 1


def test_what_is_not_trained_is_what_training_gives(
    study: ModuleType,
    command_of: Callable[[ModuleType], Callable[..., int]],
    seven: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = study.Study(name="duplicates", profile="trial", data=Path(), out=Path())
    profile = whole.read_profile() | {"datasets": ["bccd"], "seeds": [0]}
    profile["recipe"]["loader"]["mixture"] = "equal"
    ema = {"ema": {"batch_norm_images": 4}}
    profile["cures"] = {"statistics": {"train": ema}, "trained": {"train": {**ema, "loop": {"log_every": 2}}}}
    monkeypatch.setattr(study.Study, "read_profile", lambda _: profile)
    monkeypatch.setattr(study.Profile, "arms", lambda self: {"recipe": {}, **self.cures})
    monkeypatch.setattr(study, "RESAMPLES", 1)
    assert command_of(study)("--set", "train.loop.steps=1") == 0
    result = json.loads((tmp_path / "results/duplicates-trial.json").read_text(), parse_constant=pytest.fail)
    assert result["complete"]
    assert [one["what"] for one in result["bars"]] == ["recipe", "statistics", "trained"] == list(result["arms"])
    runs = tmp_path / "runs"
    reports = {arm: json.loads((runs / f"{arm}-0/report.json").read_text()) for arm in result["arms"]}
    assert {len(means) for one in reports.values() for means in one["means"].values()} == {2}
    assert not (runs / "statistics-0/last").exists()
    assert reports["statistics"]["training_seconds"] == 0
    recipe = study.RunConfig.checked(read_yaml(runs / "trained-0/config.yaml"))
    found, wanted = (METR.from_pretrained(runs / f"{arm}-0/last", device="cpu") for arm in ("recipe", "trained"))
    assert not same_weights(found, wanted)
    study.settle(found, recipe, [f"bccd={seven / 'bccd'}"], whole)
    assert same_weights(found, wanted)


def test_arms_are_compared_seed_by_seed(study: ModuleType) -> None:
    def run(seed: int, bare: float, adds: float) -> dict[str, Any]:
        """Seeds are 10 AP apart, and draws 1 AP."""
        draws = bare + 10 * seed + np.arange(3.0)
        means = {"bare": draws, "suppressed": draws + adds, "joint_bare": draws - 1, "joint": draws + adds - 1}
        facts = {"steps": 5, "images": 7, "repeats": 2.0 + seed, "commit": "abc", "training_seconds": 60.0}
        return {"means": {figure: each.tolist() for figure, each in means.items()}, **facts}

    found = {("recipe", seed): run(seed, 20.0, 1.5) for seed in (0, 1)}
    found |= {("cure", 0): run(0, 24.0, 0.25), ("together", 1): run(1, 23.0, 0.5)}
    arms = study.summary(("recipe", "cure", "none yet", "together"), (0, 1, 2), found)
    assert {arm: one["seeds"] for arm, one in arms.items()} == {"recipe": [0, 1], "cure": [0], "together": [1]}
    assert arms["recipe"]["gains"] is None
    assert arms["recipe"]["mean"]["bare"] == 25
    # of the same seeds: the second seed of the recipe says nothing of the cure
    assert arms["cure"]["gains"]["bare"] == {"mean": 4.0, "low": 4.0, "high": 4.0}
    assert arms["together"]["gains"]["suppressed"]["mean"] == 2
    assert arms["together"]["gains"]["adds"]["mean"] == -1
    facts = {"profile": "trial", "complete": False, "hardware": "none", "torch": "2", "commit": "abc"}
    bars = [{"what": arm, **study.report.bar(one["adds"]["mean"], study.ADDS)} for arm, one in arms.items()]
    runs = [{"arm": arm, "seed": seed, **one} for (arm, seed), one in found.items()]
    settings = {"datasets": ["a", "b"]}
    result = {**facts, "training_seconds": 240, "settings": settings, "runs": runs, "arms": arms, "bars": bars}
    page = study.page(result)
    assert "(not complete): 4 minutes" in page
    assert "of 2 datasets, 7 images" in page
    assert "| recipe | 2 | 25.0 (20.0 to 30.0) | 26.5 (21.5 to 31.5) | 1.5 (1.5 to 1.5) | 24.0" in page
    assert "| cure | +4.00 (+4.00 to +4.00) | +2.75" in page
    assert "- cure: suppression adds +0.25 (+0.25 to +0.25) AP (at most 0.3: met)" in page
    assert "- together: suppression adds +0.50 (+0.50 to +0.50) AP (at most 0.3: missed)" in page
    alone = {**result, "arms": {"recipe": arms["recipe"]}, "bars": bars[:1]}
    assert "| arm | bare" not in study.page(alone), "nothing to compare with the recipe"


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
