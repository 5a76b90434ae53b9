"""The MultiField study runs from end to end in miniature, can be stopped, and says what it measured."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from metr.data.images import read_image

SETTINGS = {"hardware", "torch", "commit", "seed", "steps", "images_seen", "training_seconds", "wall_seconds"}


@pytest.fixture
def multifield(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("multifield")


@pytest.fixture
def run(multifield: ModuleType, command_of: Callable[[ModuleType], Callable[..., int]]) -> Callable[..., int]:
    return command_of(multifield)


@pytest.mark.slow
def test_it_writes_settings_numbers_and_images(
    run: Callable[..., int], multifield: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--set", "train.loop.steps=2", "--set", "train.loop.curves=true") == 0
    results = tmp_path / "results"
    result = json.loads((results / "multifield-trial.json").read_text(), parse_constant=pytest.fail)
    assert set(result) >= SETTINGS
    assert (result["steps"], result["images_seen"]) == (2, 4)
    assert result["wall_seconds"] >= result["training_seconds"]
    assert result["settings"]["train"]["loop"]["steps"] == 2
    report = result["report"]
    assert {one["name"]: one["in_mean"] for one in report["datasets"]} == {
        name: name != "coco_mini" for name in multifield.FIELDS
    }
    assert set(report["confusion"]["domains"]) == set(multifield.FIELDS.values())
    assert report["unannotated"] == "negative"
    assert all(math.isfinite(report["mean"][mode]["ap"]) for mode in ("own", "joint"))
    assert 0 <= report["mean"]["confusion"] <= 100
    page = (results / "multifield-trial.md").read_text()
    assert "4 images seen in 2 steps" in page
    assert "coco_mini (not in the mean)" in page
    for image in ("detections.jpg", "curves.png"):
        assert min(read_image(results / f"multifield-trial-{image}").shape[:2]) > 100
    # run again nothing is trained, and a run of other settings is not taken for it
    capsys.readouterr()
    assert run("--set", "train.loop.steps=2", "--set", "train.loop.curves=true") == 0
    assert json.loads((results / "multifield-trial.json").read_text()) == result
    assert run("--set", "train.loop.steps=3") == 1
    assert "the run was made with train.loop.steps 2, now 3" in " ".join(capsys.readouterr().out.split())


def test_arms_go_to_a_page_of_metr(multifield: ModuleType, tmp_path: Path) -> None:
    result = json.loads((Path(multifield.__file__).parent / "results/multifield-comparison.json").read_text())
    text = multifield.write_arms(result, tmp_path / "arms.html").read_text()
    assert "What the datasets gave each other" in text
    for name in multifield.PROFILES["comparison"][0]:
        assert f"{name} alone" in text


def test_stopped_it_writes_no_result(
    run: Callable[..., int],
    study_of: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Stopped:
        interrupted = True

    monkeypatch.setattr(study_of("runner"), "train", lambda *_, **__: Stopped)
    assert run() == 130
    assert "give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_arms_are_compared_and_finished_ones_are_not_run_again(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--profile", "comparison", "--set", "train.loop.steps=4")
    mixture = "{bccd: 0.25, chess_pieces: 0.25, endangered_animals: 0.25, playing_cards: 0.25}"
    assert run(*short, "--set", f"loader.mixture={mixture}", "--arms", "separate", "closed_set") == 0
    assert run(*short, "--set", f"loader.mixture={mixture}", "--arms", "pseudo_label", "closed_set") == 0
    result = json.loads((tmp_path / "results/multifield-comparison.json").read_text(), parse_constant=pytest.fail)
    assert set(result["arms"]) == {"separate", "closed_set", "pseudo_label"}
    assert {arm["images_seen"] for arm in result["arms"].values()} == {8}
    assert result["arms"]["pseudo_label"]["report"]["unannotated"] == "pseudo_label"
    assert set(result["arms"]["separate"]["report"]["mean"]) == {"own"}
    page = (tmp_path / "results/multifield-comparison.md").read_text()
    assert "a METR for each" in page
    assert "Against the closed head" in page
    for image in ("bars.png", "detections.jpg"):
        assert min(read_image(tmp_path / f"results/multifield-comparison-{image}").shape[:2]) > 100
    assert capsys.readouterr().out.count("─ closed_set ─") == 1
