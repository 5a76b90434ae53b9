"""Old datasets in a fine-tuning: what is known of their images, and what was fitted to their names."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from metr.checkpoint import DetectionDefaults, load_checkpoint, update_detection
from metr.evaluation import evaluator
from metr.evaluation.calibration import FittedScores
from metr.evaluation.coco import CocoScorer
from metr.evaluation.results import from_dict
from metr.evaluation.runner import evaluate
from metr.run_directory import RunDirectory
from metr.training.finetune import finetune, finetune_plan
from metr.training.fitted import keep_fitted
from metr.training.parts import Outcome
from metr.training.train import plan, train

from tiny import NAMES, TinyRun

SHORT = ("train.loop.device=cpu", "train.loop.steps=2", "train.loop.curves=false", "loader.workers=0")
SHORT += ("loader.batch_size=2", "train.loop.log_every=1", "train.loop.evaluate_every=0", "train.loop.images=false")


def lake(run: TinyRun, place: Path) -> str:
    """A new dataset: the meadow with other names."""
    names = {"butterfly": "moth", "leaf": "reed", "mushroom": "rush", "snail": "newt"}
    (place / "lake.yaml").write_text(
        json.dumps({"datasets": [{"name": "lake", "path": str(run.datasets[2]), "renames": names}]})
    )
    return str(place / "lake.yaml")


@pytest.fixture
def trained_on_all(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A checkpoint whose training took all seven images of the pond, as older ones have recorded it."""
    folder = tmp_path / "all"
    shutil.copytree(tiny_run.best, folder)
    config = json.loads((folder / "config.json").read_text())
    config["training"]["data"]["pond"] |= {"splits": {"train": 7, "val": 3}, "trained_on": 7}
    del config["training"]["data"]["pond"]["held_out"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pond(tiny_run: TinyRun, tmp_path: Path) -> str:
    """The pond without a val split: a fifth of its seven images is held out."""
    entry = {"name": "pond", "path": str(tiny_run.datasets[0]), "splits": {"train": ["train", "val"], "test": "val"}}
    (tmp_path / "pond.yaml").write_text(json.dumps({"datasets": [entry]}))
    return str(tmp_path / "pond.yaml")


def test_a_comparison_on_images_of_training_says_so(
    trained_on_all: Path,
    pond: str,
    tiny_run: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(evaluator, "fit_scores", found_anew)
    said = Console(width=400, file=StringIO(), record=True)
    data, options = [lake(tiny_run, tmp_path)], {"overrides": SHORT, "rehearse": [pond]}
    finetune(data, trained_on_all, tmp_path / "run", console=said, **options)
    words = " ".join(said.export_text().split())
    fact = "pond: the checkpoint was trained on 7 images of pond, this image of val among them"
    assert words.count(fact) == 2, "before training, and below the table"
    assert caplog.text.count("pond: scores are fitted to images that training has seen") == 1
    assert f"warning: {fact}: AP there says how well it knows these" in words
    assert "What to try: a datasets file with splits: {train: train, val: test}" in words
    told = json.loads((tmp_path / "run/comparison.json").read_text())
    for when in ("before", "after"):
        assert [bool(one["seen"]) for one in told[when]["datasets"]] == [False, True]
    assert load_checkpoint(tmp_path / "run").training["data"]["pond"]["held_out"] is True


def test_plans_tell_of_images_of_training(trained_on_all: Path, pond: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    for page in (
        finetune_plan([lake(tiny_run, tmp_path)], trained_on_all, rehearse_evaluate=[pond], overrides=SHORT),
        finetune_plan([pond], trained_on_all, overrides=SHORT),
        plan([pond], start=str(trained_on_all), overrides=SHORT),
    ):
        said = Console(width=400, file=StringIO(), record=True)
        said.print(page)
        assert "warning: pond: the checkpoint was trained on 7 images of pond" in said.export_text()
    clean = Console(width=400, file=StringIO(), record=True)
    clean.print(finetune_plan([pond], tiny_run.folder, overrides=SHORT))
    assert "warning: pond" not in clean.export_text()


@pytest.fixture
def fitted(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with something fitted to each of its names, where every evaluation fits something else."""
    folder = tmp_path / "fitted"
    shutil.copytree(tiny_run.best, folder)
    names = load_checkpoint(folder).vocabulary.names
    old = DetectionDefaults(calibration=dict.fromkeys(names, (9.0, 9.0)), thresholds=dict.fromkeys(names, 0.9))
    update_detection(folder, old)
    monkeypatch.setattr(evaluator, "fit_scores", found_anew)
    return folder


def found_anew(scorer: CocoScorer, *_: object) -> FittedScores:
    """Other values for each dataset."""
    number = len(scorer.categories)
    return FittedScores(calibration=dict.fromkeys(scorer.categories, (float(number), 0.5)), threshold=number / 10)


def lake_with_leaves(run: TinyRun, place: Path) -> str:
    """A new dataset of three names, of which the rehearsed pond of four has one."""
    names = {"butterfly": "moth", "snail": "newt"}
    entry = {"name": "lake", "path": str(run.datasets[2]), "renames": names, "drop": ["mushroom"]}
    (place / "leaves.yaml").write_text(json.dumps({"datasets": [entry]}))
    return str(place / "leaves.yaml")


def test_scores_of_all_names_that_are_evaluated_are_fitted(fitted: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    """As joint training does it: by name, and of names of several datasets the mean."""
    said = Console(width=2000, file=StringIO(), record=True)
    out, pond = tmp_path / "run", tiny_run.data[0]
    new = lake_with_leaves(tiny_run, tmp_path)
    finetune([new], fitted, out, console=said, overrides=SHORT, rehearse=[pond], rehearse_fraction=0.5)
    told = json.loads((out / "comparison.json").read_text())["after"]
    report = from_dict({key: value for key, value in told.items() if key != "mean"})
    for folder in (out / "best", out / "last"):  # which have the same weights
        kept = load_checkpoint(folder).detection
        assert kept.calibration == report.calibration()
        assert kept.thresholds == report.thresholds()
    assert kept.calibration.keys() == {"fish", "frog", "leaf", "turtle", "moth", "newt"}
    assert kept.calibration["fish"] == (4.0, 0.5)
    assert kept.calibration["moth"] == (3.0, 0.5)
    assert 3 < kept.calibration["leaf"][0] < 4
    assert (kept.thresholds["fish"], kept.thresholds["moth"]) == (0.4, 0.3)
    words = " ".join(said.export_text().split())
    lost = "6 of the checkpoint's names, of desk and meadow, lose calibration and threshold"
    assert f"{lost}, which fitted the old weights; to fit them anew: metr evaluate {out} DATASET --store" in words


def test_old_names_that_are_only_evaluated_are_fitted_too(fitted: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    said = Console(width=2000, file=StringIO(), record=True)
    out, new = tmp_path / "run", [lake(tiny_run, tmp_path)]
    finetune(new, fitted, out, console=said, overrides=SHORT, rehearse_evaluate=tiny_run.data)
    kept = load_checkpoint(out)
    assert kept.detection.calibration.keys() == set(kept.vocabulary.names)
    assert kept.detection.calibration["cup"] == (3.0, 0.5)
    assert "lose calibration" not in said.export_text()


@pytest.mark.parametrize("verb", ["finetune", "train"])
def test_names_that_nothing_evaluates_lose_what_was_fitted(
    fitted: Path, tiny_run: TinyRun, tmp_path: Path, verb: str
) -> None:
    said = Console(width=2000, file=StringIO(), record=True)
    out, desk = tmp_path / "run", [tiny_run.data[1]]
    if verb == "finetune":
        finetune(desk, fitted, out, console=said, overrides=SHORT, compare=False, rehearse=[tiny_run.data[0]])
    else:
        train(desk, out, start=str(fitted), console=said, overrides=SHORT)
    assert load_checkpoint(out).detection.calibration == dict.fromkeys(NAMES["desk"], (3.0, 0.5))
    assert "7 of the checkpoint's names, of pond and meadow, lose calibration and threshold" in said.export_text()


def test_what_was_fitted_to_the_best_weights_is_kept_with_these_alone(
    fitted: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(fitted, run.best)
    shutil.copytree(fitted, run.last)
    report = evaluate(fitted, tiny_run.data)
    outcome = Outcome(step=5, interrupted=False, metrics={}, best=1.0, best_step=4)
    keep_fitted(report, run, outcome)
    best, last = (load_checkpoint(folder).detection for folder in (run.best, run.last))
    assert best.calibration["cup"] == (3.0, 0.5)
    assert last.calibration["cup"] == (9.0, 9.0)
