"""The study of rehearsal: both arms from one detector, stopped and gone on with, and what is lost is named."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from metr.training.config import RunConfig
from metr.training.trainer import Trainer

from tiny import TinyRun

OLD, NEW = ("bccd", "chess_pieces", "playing_cards"), "aquarium"


@pytest.fixture
def rehearsal(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("rehearsal")


@pytest.fixture
def run(rehearsal: ModuleType, command_of: Callable[[ModuleType], Callable[..., int]]) -> Callable[..., int]:
    return command_of(rehearsal)


@pytest.fixture
def profile(rehearsal: ModuleType) -> Any:
    return profile_of(rehearsal, "trial").model_copy(update={"old": OLD})


def profile_of(rehearsal: ModuleType, name: str) -> Any:
    return rehearsal.Profile.checked(study(rehearsal, name).read_profile())


def study(rehearsal: ModuleType, name: str = "trial") -> Any:
    return rehearsal.Study(name="rehearsal", profile=name, data=Path(), out=Path())


Aps = tuple[float | None, float | None]


def results(**found: tuple[Aps, Aps, Aps]) -> list[Any]:
    """Both arms, by AP of own and of all names: before, after without rehearsal, after with it."""

    def by_mode(aps: Aps) -> dict[Any, float | None]:
        return {"own": aps[0], "joint": aps[1]}

    return [
        {
            "arm": arm,
            "datasets": [
                {"dataset": name, "before": by_mode(aps[0]), "after": by_mode(aps[number])}
                for name, aps in found.items()
            ],
            "steps": 300,
            "training_seconds": 60.0,
            "commit": "abc",
        }
        for number, arm in enumerate(("without", "with"), 1)
    ]


FOUND: dict[str, tuple[Aps, Aps, Aps]] = {
    "bccd": ((40.0, 38.0), (12.0, 9.0), (39.0, 37.5)),
    "chess_pieces": ((60.0, 60.0), (58.0, 31.0), (61.0, 60.5)),
    "playing_cards": ((20.0, 20.0), (19.0, 19.0), (18.1, 18.0)),
    "aquarium": ((0.0, 0.5), (25.0, 24.0), (23.0, 23.0)),
}


def compared(rehearsal: ModuleType, profile: Any, **changed: tuple[Aps, Aps, Aps]) -> Any:
    return rehearsal.summary(study(rehearsal), profile, "runs/joint", [], results(**FOUND | changed))


def test_what_is_lost_is_named(rehearsal: ModuleType, profile: Any) -> None:
    result = compared(rehearsal, profile)
    page = rehearsal.page(result)
    assert "**The old names are kept with rehearsal, in all 3 old datasets that were found before; " in page
    lost = "bccd (own names 40.0 to 12.0, all names 38.0 to 9.0); chess_pieces (all names 60.0 to 31.0)"
    assert f"without it, lost are: {lost}.**" in page
    own, unified = page.split("## Own names")[1].split("## All names")
    assert "| bccd | old | 40.0 | 12.0 **lost** | 39.0 | -28.0 | -1.0 | +27.0 |" in own
    assert "| chess_pieces | old | 60.0 | 58.0 | 61.0 | -2.0 | +1.0 | +3.0 |" in own
    assert "| chess_pieces | old | 60.0 | 31.0 **lost** | 60.5 | -29.0 | +0.5 | +29.5 |" in unified
    assert "| mean of 3 old | old | 40.0 | 29.7 | 39.4 | -10.3 | -0.6 | +9.7 |" in own
    assert "| aquarium | new | 0.0 | 25.0 | 23.0 | +25.0 | +23.0 | -2.0 |" in own
    assert result["lost"] == {"without": {"bccd": ["own", "joint"], "chess_pieces": ["joint"]}, "with": {}}
    assert result["datasets"]["bccd"]["change"]["without"]["own"] == pytest.approx(-28.0)
    json.dumps(result, allow_nan=False)
    assert [(goal["aim"], round(goal["found"], 1), goal["reached"]) for goal in result["bars"]] == [
        (92.0, 98.4, True), (92.0, 98.3, True)
    ]  # fmt: skip
    assert "- mean AP of the old datasets that is left with rehearsal, own names, %: +98.4 (aim +92.0), reached" in page


def test_a_dataset_that_rehearsal_loses_is_named_too(rehearsal: ModuleType, profile: Any) -> None:
    result = compared(rehearsal, profile, bccd=((40.0, 38.0), (38.0, 37.0), (20.0, None)))
    assert result["verdict"] == (
        "The old names are not all kept: with rehearsal, lost are: bccd (own names 40.0 to 20.0, all names 38.0 to "
        "0.0); without it, lost are: chess_pieces (all names 60.0 to 31.0)."
    )
    assert "| 20.0 **lost** | -2.0 | -20.0 | -18.0 |" in rehearsal.page(result)


def test_nothing_is_claimed_of_what_was_not_found_before(rehearsal: ModuleType, profile: Any) -> None:
    kept = ((50.0, 50.0), (50.0, 50.0), (50.0, 50.0))
    some = compared(rehearsal, profile, bccd=((0.3, None), (0.0, None), (0.0, None)), chess_pieces=kept)
    assert "in all 2 old datasets that were found before; they are without it, too." in some["verdict"]
    assert "Not found before, so nothing to lose: bccd." in rehearsal.page(some)
    nothing = ((0.0, None), (0.0, 0.0), (0.0, 0.0))
    none = compared(rehearsal, profile, **dict.fromkeys(OLD, nothing))
    assert none["verdict"].startswith("Nothing can be said of the old names")
    assert "| bccd | old | - | 0.0 | 0.0 | - | - | 0.0 |" in rehearsal.page(none)


def test_arms_that_are_not_alike_are_told(rehearsal: ModuleType, profile: Any) -> None:
    def page_of(*arms: Any) -> str:
        return rehearsal.page(rehearsal.summary(study(rehearsal), profile, "runs/joint", [], arms))

    without, rehearsed = results(**FOUND)
    uneven = page_of(without, rehearsed | {"steps": 1200})
    assert "in 300 to 1,200 steps" in uneven
    assert "**not for the same steps: the arms (without 300, with 1,200)**" in uneven
    other = results(**FOUND | {"bccd": ((43.0, 38.0), (0.0, 0.0), (0.0, 0.0))})[1]
    assert "**The arms did not begin with one detector" in page_of(without, other)
    alike = page_of(without, rehearsed)
    assert "did not begin" not in alike
    assert "in 300 steps with the same seed, for the same steps;" in alike


@pytest.mark.slow
def test_stopped_in_every_run_it_goes_on(
    run: Callable[..., int], rehearsal: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    old = profile_of(rehearsal, "trial").old
    made = Trainer.train_step

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        if self.counters.step + 1 == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return made(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    runs, stem = tmp_path / "runs", tmp_path / "results/rehearsal-trial"
    for finished in (set(), {"pretrained"}, {"pretrained", "without"}):
        assert run() == 130
        assert "not done yet; to go on, give the same command again" in capsys.readouterr().out
        assert {path.parent.name for path in runs.rglob("report.json")} == finished
        assert not stem.parent.exists()
    assert run() == 0
    told = json.loads(stem.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert {arm: one["steps"] for arm, one in told["arms"].items()} == {"without": 3, "with": 3}
    assert list(told["datasets"]) == [*old, NEW, "mean of 4 old"]
    assert told["alike"]
    assert told["pretraining_seconds"] > 0
    assert told["settings"]["from"] == "its own pretraining"
    assert "| aquarium | new |" in stem.with_suffix(".md").read_text()
    # the arms differ in what they draw, and in nothing else
    configs = [(runs / arm / "config.yaml").read_text() for arm in ("without", "with")]
    assert configs[0] == configs[1]
    without, rehearsed = (json.loads((runs / arm / "finetuning.json").read_text()) for arm in ("without", "with"))
    assert without["new"] == rehearsed["new"] == {NEW: 4}
    assert (without["rehearsed"], set(rehearsed["rehearsed"])) == ({}, set(old))
    assert Path(without["from"]) == Path(rehearsed["from"]) == runs / "pretrained/last"
    learnt = json.loads((runs / "pretrained/report.json").read_text())
    assert learnt["data"] == list(old)
    # finished runs are not run again, nor taken for others
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")}
    assert run() == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")} == before
    capsys.readouterr()
    for other, named in ((("--set", "train.loop.steps=2"), "steps 3, now 2"), (("--from", "elsewhere"), "from None")):
        assert run(*other) == 1
        assert named in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_it_begins_with_a_checkpoint_that_is_given(
    run: Callable[..., int], rehearsal: ModuleType, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """All datasets of the checkpoint are the old ones, where the profile names none."""
    for name, folder in zip(
        ("pond", "desk", "meadow", "tomato"), (*tiny_run.datasets, tiny_run.datasets[0]), strict=True
    ):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(folder, target_is_directory=True)
    fields = ("--profile", "fields", "--data", str(tmp_path / "data"), "--from", str(tiny_run.folder))
    assert run(*fields, "--set", "train.loop.steps=1") == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"without", "with"}
    told = json.loads((tmp_path / "results/rehearsal-fields.json").read_text())
    assert (told["settings"]["from"], told["pretraining_seconds"]) == (tiny_run.folder.name, None)
    assert list(told["datasets"]) == ["pond", "desk", "meadow", "tomato", "mean of 3 old"]
    assert str(tmp_path) not in (tmp_path / "results/rehearsal-fields.json").read_text()


def test_a_checkpoint_that_does_not_fit_is_refused(
    run: Callable[..., int], rehearsal: ModuleType, tiny_run: TinyRun, profile: Any, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run("--from", str(tiny_run.folder)) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "has not seen bccd, chess_pieces, endangered_animals, playing_cards, so there is nothing to rehearse" in said
    known = profile.model_copy(update={"old": ("desk", "meadow"), "new": "pond"})
    for name, folder in zip(("pond", "desk", "meadow"), tiny_run.data, strict=True):
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.setattr(rehearsal.Study, "read_profile", lambda _: known.model_dump(mode="json"))
    assert run("--from", str(tiny_run.folder), "--data", str(tmp_path)) == 1
    assert "has seen pond already, which is to be new" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["trial", "gpu"])
def test_profiles_are_whole(rehearsal: ModuleType, name: str) -> None:
    profile = profile_of(rehearsal, name)
    assert {*profile.old, profile.new} <= set(rehearsal.runner.DATASETS)
    assert profile.new not in profile.old
    pretraining, tuning = RunConfig.checked(profile.pretrain), RunConfig.checked(profile.tuning)
    assert pretraining.augmentation == tuning.augmentation
    assert pretraining.loader.batch_size == tuning.loader.batch_size
    assert (tuning.train.loop.evaluate_every, tuning.train.loop.patience) == (0, 0)
    like = yaml.safe_load((rehearsal.runner.HERE / f"profiles/transfer-{name}.yaml").read_text())["pretrain"]
    assert profile.pretrain["train"]["optimizer"] == like["train"]["optimizer"]
    assert profile.pretrain["train"]["schedule"] == like["train"]["schedule"]
    assert profile.pretrain["train"]["ema"] == like["train"]["ema"]
