"""The transfer study runs from end to end in miniature, goes on where it stopped, and shows what got worse."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from metr.checkpoint import Checkpoint
from metr.config import Tree, merge, read_yaml
from metr.data.images import read_image
from metr.errors import ConfigError
from metr.text.vocabulary import Vocabulary
from metr.training.config import RunConfig, load_recipe
from metr.training.finetune_recipe import RECIPE, finetune_recipe, left_to_finetuning

from tiny import TinyRun

# in what the arms may differ: what is frozen, the rates, and where the backbone's first weights came from
MAY_DIFFER = {
    "train.optimizer.learning_rate",
    "model.backbone.pretrained",
    "model.backbone.revision",
}


@pytest.fixture
def transfer(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("transfer")


@pytest.fixture
def run(transfer: ModuleType, command_of: Callable[[ModuleType], Callable[..., int]]) -> Callable[..., int]:
    return command_of(transfer)


@pytest.fixture
def profile(transfer: ModuleType) -> Any:
    return profile_of(transfer, "trial")


def study(transfer: ModuleType, name: str, out: Path) -> Any:
    return transfer.Study(name="transfer", profile=name, data=out, out=out)


def profile_of(transfer: ModuleType, name: str) -> Any:
    return transfer.Profile.checked(study(transfer, name, Path()).read_profile())


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def differences(first: Tree, second: Tree) -> set[str]:
    ours, theirs = dict(leaves(first)), dict(leaves(second))
    return {key for key in ours.keys() | theirs.keys() if ours.get(key, "none") != theirs.get(key, "none")}


def results(gains: dict[tuple[str, float], float], seeds: tuple[int, ...] = (0,)) -> list[Tree]:
    """Runs of both arms: 10 AP more a seed from the backbone alone, and so much more when pretrained."""
    return [
        {
            "left_out": name,
            "share": share,
            "seed": seed,
            "arm": arm,
            "images": round(200 * share),
            "steps": 5,
            "ap": 10.0 + 10 * seed + (gain if arm == "pretrained" else 0.0),
            "ap50": 50.0,
            "training_seconds": 1.0,
            "commit": "abc",
        }
        for (name, share), gain in gains.items()
        for seed in seeds
        for arm in ("imagenet", "pretrained")
    ]


def summary(transfer: ModuleType, profile: Any, runs: list[Tree], *left_out: str) -> Tree:
    named = profile.model_copy(update={"left_out": left_out})
    return transfer.summary(study(transfer, "trial", Path()), named, [], runs, True)


@pytest.mark.slow
def test_every_run_once_and_both_arms_alike(
    run: Callable[..., int], transfer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--set", "train.loop.steps=2") == 0
    stem = tmp_path / "results/transfer-trial"
    told = json.loads(stem.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert told["complete"]
    assert [(one["left_out"], one["share"], one["arm"]) for one in told["runs"]] == [
        (name, share, arm)
        for name in ("chess_pieces", "playing_cards")
        for share in (0.1, 1.0)
        for arm in ("imagenet", "pretrained")
    ]
    assert {(one["share"], one["images"], one["steps"]) for one in told["runs"]} == {(0.1, 1, 2), (1.0, 4, 2)}
    assert [bar["aim"] for bar in told["bars"]] == [5.0, 1.5, -1.0]
    assert "| **mean** | 100%" in stem.with_suffix(".md").read_text()
    assert min(read_image(stem.with_suffix(".png")).shape[:2]) > 100
    runs = tmp_path / "runs"
    assert {path.name for path in runs.iterdir()} == {"without-chess_pieces-playing_cards", *transfer_names()}
    assert told["pretraining"][0]["without"] == ["chess_pieces", "playing_cards"]
    report = json.loads((runs / "without-chess_pieces-playing_cards/report.json").read_text())
    assert not any("chess" in one or "cards" in one for one in report["data"])
    # what both arms ran with, defaults of their verbs included
    for left_out in transfer_names():
        for share in ("0.1", "1"):
            folders = [runs / left_out / f"{share}-0-{arm}" for arm in ("imagenet", "pretrained")]
            first, second = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders)
            found = {key for key in differences(first, second) if not key.startswith("model.backbone.options.")}
            assert found <= MAY_DIFFER
            ours, theirs = (load_file(folder / "last/model.safetensors") for folder in folders)
            # a checkpoint knows its backbone's options in full; both are of one make
            assert {key: value.shape for key, value in ours.items()} == {key: v.shape for key, v in theirs.items()}
            assert first["train"]["loop"]["steps"] == 2
    assert all(one["commit"] not in {"", "unknown"} for one in (*told["runs"], *told["pretraining"]))
    page = stem.with_suffix(".md").read_text()
    assert "| chess_pieces | 10% | 1 | 2 | 1 |" in page, "the steps that were made, not those of the profile"
    assert "Not all runs are of one commit" not in page
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")}
    written = stem.with_suffix(".json").read_bytes()
    capsys.readouterr()
    assert run() == 1, "finished runs of other steps are not taken for these"
    said = " ".join(capsys.readouterr().out.split())
    assert "without-chess_pieces-playing_cards: the run was made with train.loop.steps 2, now 3" in said
    assert "name another --out, or remove this folder" in said
    assert stem.with_suffix(".json").read_bytes() == written
    assert run("--set", "train.loop.steps=2", "--set", "train.loop.log_every=5") == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")} == before
    assert "pretraining without" not in capsys.readouterr().out


def transfer_names() -> set[str]:
    return {"chess_pieces", "playing_cards"}


def test_stopped_it_says_how_to_go_on(
    run: Callable[..., int],
    transfer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(transfer.runner, "run_all", lambda *_: False)
    assert run() == 130
    assert "not done yet; to go on, give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "results").exists(), "nothing can be compared yet"
    # what is finished is written, and said to be a part
    part = results({("chess_pieces", 0.1): 7.0})
    part[1]["commit"] = "def"
    monkeypatch.setattr(transfer.runner, "reports", lambda runs: part if len(runs) > 1 else [])
    assert run() == 130
    told = json.loads((tmp_path / "results/transfer-trial.json").read_text())
    assert not told["complete"]
    assert told["bars"] == [], "one of two datasets is missing"
    page = (tmp_path / "results/transfer-trial.md").read_text()
    assert "(not complete)" in page
    # runs of several commits are told apart
    assert "commit abc and def." in page
    assert "- abc: chess_pieces, 10%, seed 0, imagenet\n- def: chess_pieces, 10%, seed 0, pretrained\n" in page
    assert [one["commit"] for one in told["runs"]] == ["abc", "def"]


def test_aims_and_regressions(transfer: ModuleType, profile: Any, tmp_path: Path) -> None:
    gains = {("a", 0.1): 8.0, ("a", 1.0): 4.5, ("b", 0.1): 3.0, ("b", 1.0): -1.5}
    result = summary(transfer, profile, results(gains, seeds=(0, 1, 2)), "a", "b")
    assert [(bar["found"], bar["reached"]) for bar in result["bars"]] == [
        (pytest.approx(5.5), True),
        (pytest.approx(1.5), True),
        (pytest.approx(-1.5), False),
    ]
    page = transfer.page(result)
    assert "| a | 10% | 20 | 5 | 3 | 20.0 (10.0 to 30.0) | 28.0 (18.0 to 38.0) | +8.0 |" in page
    assert "in the same order, for the same steps." in page
    assert "Worse with pretraining: b at 100% (-1.5)." in page
    assert "- least gain of a dataset at 100%: -1.5 (aim -1.0), **not reached**" in page
    transfer.report.draw_curves(tmp_path / "curves.png", transfer.curves(result), transfer.TITLES)
    assert min(read_image(tmp_path / "curves.png").shape[:2]) > 100
    # a seed of which one arm is missing is left out
    partial = summary(transfer, profile, results(gains, seeds=(0, 1))[:-1], "a", "b")
    assert [point["seeds"] for point in partial["points"]] == [[0, 1], [0, 1], [0, 1], [0]]


def test_further_arms_have_a_column_a_gain_and_goals_of_their_own(transfer: ModuleType, profile: Any) -> None:
    runs = results({("a", 0.1): 8.0, ("b", 0.1): 3.0}, seeds=(0, 1))
    half = [one | {"arm": "backbone-0.5", "ap": one["ap"] - 9} for one in runs if one["arm"] == "pretrained"]
    result = summary(transfer, profile.model_copy(update={"backbones": (0.5,)}), runs + half, "a", "b")
    assert [(one["what"], one["found"]) for one in result["bars"]] == [
        ("gain in mean AP at 10%", pytest.approx(5.5)),
        ("gain in mean AP at 10%, backbone-0.5", pytest.approx(-3.5)),
    ]
    page = transfer.page(result)
    assert "| pretrained, backbone 50% ImageNet's | gain | gain, backbone 50% ImageNet's |" in page
    assert "| 15.0 (10.0 to 20.0) | 23.0 (18.0 to 28.0) | 14.0 (9.0 to 19.0) | +8.0 | -1.0 |" in page
    assert "Worse with pretraining: nothing." in page
    assert "Worse if pretrained, backbone 50% ImageNet's: a at 10% (-1.0), b at 10% (-6.0)." in page


def test_steps_that_differ_are_said(transfer: ModuleType, profile: Any) -> None:
    uneven = results({("a", 0.1): 8.0, ("b", 0.1): 3.0}, seeds=(0, 1))
    uneven[3]["steps"] = 1200
    page = transfer.page(summary(transfer, profile, uneven, "a", "b"))
    assert "| a | 10% | 20 | 5 to 1,200 | 2 |" in page
    assert "| b | 10% | 20 | 5 | 2 |" in page
    assert "**not for the same steps: a at 10% (imagenet 5, pretrained 5 to 1,200)**" in page
    assert "for the same steps." not in page


@pytest.mark.parametrize("name", ["trial", "gpu", "fields"])
def test_both_arms_of_a_profile_are_alike(transfer: ModuleType, tmp_path: Path, name: str) -> None:
    """Whatever the verbs' defaults are: nothing of them comes through but the rates."""
    profile = profile_of(transfer, name)
    given = read_yaml(transfer.runner.HERE / "profiles/checkpoint-thirty.yaml")
    pretraining = load_recipe("nano", changes=profile.pretrain or given)
    model = {} if profile.pretrain else transfer.network_of(pretraining.model)
    checkpoint = Checkpoint(
        model=pretraining.model,
        vocabulary=Vocabulary(names=("fish",)),
        text_embeddings=torch.zeros(1, 4),
        text_encoder=pretraining.text.model_dump(mode="json"),
        preprocessing=pretraining.augmentation.resize.model_dump(mode="json"),
        training={"unannotated": pretraining.unannotated, RECIPE: left_to_finetuning(pretraining)},
    )
    found: set[str] = set()
    for share in profile.seeds:
        seed = ("train.loop.seed=1",)
        alone = study(transfer, name, tmp_path).recipe(merge({"model": model}, profile.tree("imagenet", share)), *seed)
        overrides = (*seed, *transfer.runner.as_overrides(profile.tree("pretrained", share)))
        for images in (round(190 * share), 2_000):
            tuned = finetune_recipe(checkpoint, images, None, overrides)
            found = differences(alone.model_dump(mode="json"), tuned.model_dump(mode="json"))
            assert found <= MAY_DIFFER
        assert "train.optimizer.learning_rate" in found, "of 2,000 images, not of so few"


@pytest.mark.parametrize("name", ["trial", "gpu"])
def test_profiles_are_whole(transfer: ModuleType, name: str, seven: Path) -> None:
    profile = profile_of(transfer, name)
    assert set(profile.left_out) < set(transfer.DATASETS)
    assert profile.seeds.keys() == profile.steps.keys()
    assert "coco_mini" not in profile.left_out
    resize = RunConfig.checked(profile.pretrain).augmentation.resize
    for share in profile.seeds:
        for arm in transfer.ARMS:
            recipe = RunConfig.checked(profile.tree(arm, share))
            assert recipe.train.loop.steps == profile.steps[share]
            assert (recipe.train.loop.evaluate_every, recipe.train.loop.patience) == (0, 0)
            assert recipe.augmentation.resize == resize
    before, arms = transfer.plan(study(transfer, name, seven), profile)
    assert len(before) == (1 if profile.shared else len(profile.left_out))
    assert len(arms) == 2 * len(profile.left_out) * sum(map(len, profile.seeds.values()))
    with pytest.raises(ConfigError, match="no steps for the fraction 1"):
        transfer.plan(study(transfer, name, seven), profile.model_copy(update={"steps": {}, "seeds": {1.0: (0,)}}))


def test_the_profile_of_unseen_fields_is_whole(
    transfer: ModuleType, study_of: Callable[[str], ModuleType], tiny_run: TinyRun, tmp_path: Path
) -> None:
    profile = profile_of(transfer, "fields")
    assert not set(profile.left_out) & set(study_of("study_data").every_licensed())
    assert profile.seeds == {0.05: (0,), 0.1: (0, 1, 2), 0.25: (0,), 1.0: (0,)}
    assert profile.seeds.keys() == profile.steps.keys() == profile.least.keys()
    for name in profile.left_out:
        (tmp_path / name).symlink_to(tiny_run.datasets[0], target_is_directory=True)
    before, arms = transfer.plan(study(transfer, "fields", tmp_path), profile, str(tiny_run.folder))
    assert (before, len(arms)) == ([], 126)
    assert profile.arms == ("imagenet", "pretrained", "backbone-1")
    for arm, mixed in zip(profile.arms, (0.0, 0.0, 1.0), strict=True):
        recipe = RunConfig.checked(profile.tree(arm, 1.0))
        assert recipe.train.pretrained_backbone == mixed
        assert recipe.augmentation.sizes == (), "of the profile, not of the checkpoint"
    # goals at each fraction, of the mean over seeds
    gains = {(name, share): 12.5 for name in ("a", "b") for share in profile.seeds} | {("a", 0.25): -3.5}
    three = [one for one in results(gains, seeds=(0, 1, 2)) if one["share"] == 0.1 or one["seed"] == 0]
    goals = transfer.goals(
        transfer.report.compare_arms(three, ("left_out", "share"), transfer.ARMS),
        profile.model_copy(update={"left_out": ("a", "b"), "backbones": ()}),
    )
    assert {goal["what"]: (goal["aim"], goal["reached"]) for goal in goals} == {
        "gain in mean AP at 10%": (12.0, True),
        "gain in mean AP at 100%": (5.0, True),
        "least gain of a dataset at 5%": (-3.0, True),
        "least gain of a dataset at 10%": (-1.0, True),
        "least gain of a dataset at 25%": (-3.0, False),
        "least gain of a dataset at 100%": (-3.0, True),
    }


@pytest.mark.slow
def test_it_begins_with_a_checkpoint_that_is_given(
    run: Callable[..., int], transfer: ModuleType, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes = {"left_out": ("tomato",), "seeds": {0.5: (0,), 1.0: (0,)}, "steps": {0.5: 1, 1.0: 1}, "backbones": ()}
    short = profile_of(transfer, "fields").model_copy(update=changes)
    monkeypatch.setattr(transfer.Study, "read_profile", lambda _: short.model_dump(mode="json"))
    for name in ("tomato", "pond"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(tiny_run.datasets[0], target_is_directory=True)
    fields = ("--profile", "fields", "--data", str(tmp_path / "data"), "--set", "train.loop.steps=1")
    assert run(*fields, "--from", str(tiny_run.folder)) == 0
    stem = tmp_path / "results/transfer-fields"
    told = json.loads(stem.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert [(one["share"], one["arm"], one["images"]) for one in told["runs"]] == [
        (0.5, "imagenet", 2), (0.5, "pretrained", 2), (1.0, "imagenet", 4), (1.0, "pretrained", 4)
    ]  # fmt: skip
    assert (told["pretraining"], told["start"]["name"]) == ([], tiny_run.folder.name)
    assert f"from the checkpoint {tiny_run.folder.name} (weights " in stem.with_suffix(".md").read_text()
    assert str(tmp_path) not in stem.with_suffix(".json").read_text()
    folders = [tmp_path / "runs/tomato" / f"0.5-0-{arm}" for arm in transfer.ARMS]
    first, second = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders)
    assert {key for key in differences(first, second) if not key.startswith("model.backbone.options.")} <= MAY_DIFFER
    # another checkpoint, even in the same folder, is not taken for this one; nor one that knows the dataset
    capsys.readouterr()
    monkeypatch.setattr(transfer.starts, "weights_digest", lambda _: "another")
    assert run(*fields, "--from", str(tiny_run.folder)) == 1
    assert "now 'another'" in " ".join(capsys.readouterr().out.split())
    seen = short.model_copy(update={"left_out": ("pond",)})
    monkeypatch.setattr(transfer.Study, "read_profile", lambda _: seen.model_dump(mode="json"))
    assert run(*fields, "--from", str(tiny_run.folder)) == 1
    assert "has seen pond already, which is to be new" in " ".join(capsys.readouterr().out.split())
