"""The study of a pretraining's choices in miniature, and its own comparison."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from metr.training.config import load_recipe


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("choices")


def test_the_profile_changes_one_thing_an_arm(study: ModuleType) -> None:
    whole = study.Study(name="choices", profile="thirty", data=Path(), out=Path())
    profile = study.Profile.checked(whole.read_profile())
    recipes = [load_recipe("nano", changes=study.merge(profile.recipe, tree)) for tree in ({}, *profile.arms.values())]
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(recipes)
    assert len({recipe.train.model_dump_json() for recipe in recipes}) == 1, "each sees as many images"
    assert profile.runs()[:3] == [("recipe", 0), ("recipe", 1), ("sampled by images", 0)]


def test_arms_are_compared_with_the_recipe_of_their_seed(
    study: ModuleType,
    command_of: Callable[[ModuleType], Callable[..., int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = study.Study(name="choices", profile="thirty", data=Path(), out=Path())
    profile = whole.read_profile()
    profile["recipe"]["loader"]["mixture"] = "equal"
    profile |= {"arms": {"mosaics": profile["arms"]["mosaics"]}, "seeds": [0]}
    monkeypatch.setattr(study.Study, "read_profile", lambda _: profile)
    monkeypatch.setattr(study, "every_licensed", lambda: ("bccd", "aquarium"))
    assert command_of(study)("--set", "train.loop.steps=1", "--set", "train.ema.batch_norm_images=0") == 0
    result = json.loads((tmp_path / "results/choices-thirty.json").read_text(), parse_constant=pytest.fail)
    assert result["complete"]
    assert [(one["arm"], one["seed"]) for one in result["runs"]] == [("recipe", 0), ("mosaics", 0)]
    assert [set(one["datasets"]) for one in result["runs"]] == [{"bccd", "aquarium"}] * 2
    recipe, mosaics = result["runs"]
    recipe |= {"own": 20.0, "joint": 19.0, "datasets": {"bccd": 30.0, "aquarium": 10.0, "none": None}}
    mosaics |= {"own": 21.5, "joint": 18.0, "datasets": {"bccd": 34.0, "aquarium": 9.0, "none": 1.0}}
    assert study.against(mosaics, recipe) == ["+1.5", "-1.0", "1 of 2"]
    page = study.page(result)
    assert "| recipe | 0 | 20.0 | 19.0 |" in page
    assert page.count("| +1.5 | -1.0 | 1 of 2 |") == 1
    alone = {**result, "runs": [mosaics]}
    assert "| - | - | - |" in study.page(alone), "nothing to compare with"
