"""Profiles train with exactly the settings that their results were made with, whatever follows the steps elsewhere."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from metr.config import leaves, merge, read_yaml
from metr.training.config import RunConfig, load_recipe, packaged

PROFILES = sorted((Path(__file__).resolve().parents[2] / "benchmarks/profiles").glob("*.yaml"))
FOLLOWING = {
    "train.schedule.warmup_steps",
    "train.ema.decay",
    "train.ema.tau",
    "train.loop.evaluate_every",
    "train.loop.checkpoint_every",
}


def configurations(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every configuration of a training run in a profile."""
    if "train" in tree:
        yield tree
    for own in [{}, *tree.get("detectors", {}).values()]:
        if "recipe" in tree:
            for arm in [{}, *tree.get("arms", {}).values(), *tree.get("cures", {}).values()]:
                yield merge(tree["recipe"], arm)
        if "pretrain" in tree:
            yield merge(tree["pretrain"], own.get("pretrain", {}))
    for steps in tree["steps"].values() if isinstance(tree.get("steps"), dict) else [300]:
        if "tuning" in tree:
            yield merge({"train": {"loop": {"steps": steps}}}, tree["tuning"])


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_names_all_that_would_follow_its_steps(profile: Path) -> None:
    found = list(configurations(read_yaml(profile)))
    assert found
    for tree in found:
        assert leaves(tree).keys() >= FOLLOWING | {"train.loop.steps"}
        assert load_recipe("nano", changes=tree) == RunConfig.checked(merge(packaged("nano"), tree))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_offered_by_its_study(profile: Path, study_of: Callable[[str], ModuleType]) -> None:
    name, _, called = profile.stem.rpartition("-")
    with pytest.raises(SystemExit) as ended:
        study_of(name.replace("-", "_")).main(["--profile", called, "--help"])
    assert ended.value.code == 0
