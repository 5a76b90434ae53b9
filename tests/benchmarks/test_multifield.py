"""The MultiField study runs from end to end in miniature, can be stopped, and says what it measured."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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
        name: name != "coco_mini" for name in multifield.runner.DATASETS
    }
    assert set(report["confusion"]["domains"]) == {multifield.FIELDS[name] for name in multifield.runner.DATASETS}
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


@pytest.mark.slow
def test_some_datasets_get_a_metr_of_their_own(
    run: Callable[..., int], multifield: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in profile `thirty`; datasets are given as files, as those without a val split are."""

    def as_file(name: str, folder: Path) -> str:
        file = tmp_path / f"{name}-of-the-cache.yaml"
        file.write_text(json.dumps({"datasets": [{"name": name, "path": str(folder.resolve())}]}))
        return str(file)

    protocol = multifield.PROFILES["thirty"]
    short = protocol._replace(datasets=("bccd", "chess_pieces"), arms=protocol.arms[1:], alone=("bccd",), least_steps=3)
    monkeypatch.setitem(multifield.PROFILES, "thirty", short)
    monkeypatch.setattr(multifield.runner, "argument", as_file)
    assert run("--profile", "thirty", "--set", "train.loop.steps=2") == 0
    result = json.loads((tmp_path / "results/multifield-thirty.json").read_text(), parse_constant=pytest.fail)
    assert {arm: one["images_seen"] for arm, one in result["arms"].items()} == {"separate": 6, "closed_set": 4}
    assert [one["name"] for one in result["arms"]["separate"]["report"]["datasets"]] == ["bccd"]
    assert {path.name for path in (tmp_path / "runs/separate").iterdir()} >= {"bccd", "report.json"}


def arm_of(aps: dict[str, dict[str, tuple[float, float]]], confusion: float | None = None) -> dict[str, Any]:
    """An arm by the AP of each name of each dataset, with own and with all names."""

    def part(named: dict[str, tuple[float, float]], mode: int) -> dict[str, Any]:
        values = [ap[mode] for ap in named.values()]
        several = [{"name": name, "objects": 3, "ap": ap[mode]} for name, ap in named.items()]
        return {"coco": {"ap": sum(values) / len(values), "categories": several}, "recall": {"10": 50.0}}

    datasets = [
        {"name": name, "in_mean": name != "coco_mini", "own": part(named, 0), "joint": part(named, 1)}
        for name, named in aps.items()
    ]
    mean: dict[str, Any] = {
        mode: {"ap": sum(one[mode]["coco"]["ap"] for one in datasets if one["in_mean"]) / (len(datasets) - 1)}
        for mode in ("own", "joint")
    }
    shares = {"shares": dict.fromkeys(aps, confusion)}
    report = {"datasets": datasets, "mean": mean | {"confusion": confusion}, "confusion": shares}
    return {"images_seen": 20_000, "training_seconds": 5400, "commit": "abc", "report": report}


def test_the_page_of_many_datasets(
    multifield: ModuleType, study_of: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Datasets are rows; goals; what a closed head loses where names mean the same."""
    page, protocol = study_of("multifield_page"), multifield.PROFILES["thirty"]
    assert len(protocol.datasets) == 25
    assert set(protocol.datasets) | {"endangered_animals"} == set(multifield.FIELDS)
    assert set(protocol.alone) < set(protocol.datasets)
    same = page.same_meaning(protocol.datasets)
    assert same["bottle"] == {"coco_mini": ["bottle"], "taco_litter": ["Bottle"]}
    assert page.same_meaning(["coco_mini", "bccd"]) == {}
    joint = {name: {f"name of {name}": (50.0, 48.0)} for name in protocol.datasets}
    joint["coco_mini"]["bottle"] = joint["taco_litter"]["Bottle"] = (30.0, 30.0)
    closed = {name: dict.fromkeys(named, (46.0, 45.0)) for name, named in joint.items()}
    closed["coco_mini"]["bottle"] = closed["taco_litter"]["Bottle"] = (10.0, 5.0)
    alone = {name: {f"name of {name}": (40.0, 0.0)} for name in protocol.alone}
    arms = {"separate": arm_of(alone), "closed_set": arm_of(closed, 3.0), "negative": arm_of(joint, 1.5)}
    arms["separate"]["report"]["mean"] = {"own": {"ap": 40.0}}
    facts = {"profile": "thirty", "seed": 0, "hardware": "a core", "torch": "2", "commit": "abc"}
    result = {**facts, "arms": arms, "same_meaning": same}
    result["goals"] = page.goals(result)
    text = page.page(result)
    assert "| turkish_road | 40.0 | 46.0 | 50.0 |" in text
    assert "| mean of 6 | 40.0 | 46.0 | 50.0 |" in text
    assert "| mean | - | 45.2 | 49.6 |" in text
    assert "- ahead of closed head, concatenated labels, all names: +3.5 (aim +2.0), reached" in text
    assert "- ahead of a METR for each, own names: +10.0 (aim +5.0), reached" in text
    assert "- cross-dataset confusion: 1.5 % (at most 2: met)" in text
    bottle = "| bottle | coco_mini: bottle; taco_litter: Bottle | 2 | 10.0 | 30.0 | 5.0 | 30.0 | +20.0 | +25.0 |"
    assert bottle in text
    assert "| **all other names** |  | 24 | 46.0 | 50.0 | 45.0 | 48.0 | +4.0 | +3.0 |" in text
    assert "Against the closed head, all names: +3.5 in the mean, +4.3 with own names." in text
    titles = {arm: page.TITLES[arm] for arm in arms}
    multifield.report.draw_bars(tmp_path / "bars.png", page.bars(arms), titles)
    height, width = read_image(tmp_path / "bars.png").shape[:2]
    assert width > height > 100
