"""Scores that say how likely a detection is right: what is fitted, kept, and what becomes of scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from played import annotations, detections, record

from metr.checkpoint import DetectionDefaults, load_checkpoint, save_checkpoint
from metr.config import Calibration
from metr.data.records import InMemoryAnnotations
from metr.errors import DataError
from metr.evaluation.calibration import FittedScores, fit_scores, mean_by_objects
from metr.evaluation.coco import CategoryResult, CocoResult, CocoScorer, OperatingPoint
from metr.evaluation.diagnosis import Judged, diagnose
from metr.evaluation.report import category_table
from metr.evaluation.results import DatasetReport, EvaluationReport, ModeReport, store_calibration
from metr.inference.config import InferenceConfig, PostprocessConfig, suited
from metr.inference.postprocess import ScoreThresholds
from metr.structures import Detections

from tiny import TinyRun

NAMES = ("ant", "bee", "cow")
PLANTED: dict[str, Calibration] = {"ant": (2.0, -1.0), "bee": (0.7, -0.7)}


def played(seed: int, images: int = 150) -> tuple[InMemoryAnnotations, dict[int, Detections]]:
    """Detections that are right as often as sigmoid(scale * logit(score) + shift), planted for each name."""
    rng, records, found = np.random.default_rng(seed), [], {}
    for image in range(images):
        rows, objects = [], []
        for place in range(6):
            name = NAMES[place % 2]
            score, box = float(rng.uniform(0.02, 0.98)), (15.0 * place, 5.0, 15.0 * place + 12, 20.0)
            scale, shift = PLANTED[name]
            if rng.random() < 1 / (1 + np.exp(-(scale * np.log(score / (1 - score)) + shift))):
                objects.append((NAMES.index(name), box))
            rows.append((name, score, box))
        records.append(record(image, objects))
        found[image] = detections(NAMES, *sorted(rows, key=lambda row: -row[1]))
    return annotations("farm", NAMES, *records), found


def calibrated(found: dict[int, Detections], kept: dict[str, Calibration]) -> dict[int, Detections]:
    """The scores written out, name by name."""
    moved = {}
    for image, one in found.items():
        scale, shift = torch.tensor([kept.get(name, (1.0, 0.0)) for name in one.names])[one.labels].unbind(-1)
        moved[image] = replace(one, scores=(scale * one.scores.logit() + shift).sigmoid())
    return moved


def test_what_was_planted_is_found_and_holds_on_other_images() -> None:
    truth, found = played(0)
    fitted = fit_scores(CocoScorer(truth), found, NAMES).calibration
    for name, planted in PLANTED.items():
        assert fitted[name] == pytest.approx(planted, abs=0.4)
    others, more = played(1)
    before, after = (
        diagnose(Judged.of(CocoScorer(others), one, NAMES, ScoreThresholds()), ScoreThresholds()).calibration.error
        for one in (more, calibrated(more, fitted))
    )
    assert before is not None
    assert after is not None
    assert before > 0.08
    assert after < 0.05
    moved = CocoScorer(others).score(calibrated(more, fitted))
    assert moved.ap == pytest.approx(CocoScorer(others).score(more).ap, abs=1e-6), "the order of a name's stays"


def test_a_fit_is_the_likeliest_near_that_of_all_names() -> None:
    """Against a search over a grid; the name without an object has the fit of all names."""
    truth, found = played(2, images=12)
    fitted = fit_scores(CocoScorer(truth), found, NAMES).calibration
    x: dict[str, list[float]] = {name: [] for name in NAMES}
    y: dict[str, list[float]] = {name: [] for name in NAMES}
    for at, one in zip(truth.records, found.values(), strict=True):
        objects = {(int(label), float(box[0])) for label, box in zip(at.labels, at.boxes, strict=True)}
        for box, logit, label in zip(one.boxes.tolist(), one.scores.logit().tolist(), one.labels.tolist(), strict=True):
            x[NAMES[label]].append(logit)
            y[NAMES[label]].append(float((label, box[0]) in objects))
    scale, shift = torch.meshgrid(torch.linspace(0.1, 4, 79), torch.linspace(-3, 3, 121), indexing="ij")

    def likeliest(names: tuple[str, ...], near: Calibration) -> tuple[float, float]:
        own, hit = (torch.tensor([value for name in names for value in values[name]]) for values in (x, y))
        moved = scale[..., None] * own + shift[..., None]
        costs = torch.nn.functional.binary_cross_entropy_with_logits(moved, hit.expand_as(moved), reduction="none")
        cost = costs.sum(-1) + 5 * ((scale - near[0]) ** 2 + (shift - near[1]) ** 2)
        best = int(cost.argmin())
        return float(scale.flatten()[best]), float(shift.flatten()[best])

    every = likeliest(NAMES[:2], (1.0, 0.0))
    assert fitted["cow"] == pytest.approx(every, abs=0.05)
    for name in NAMES[:2]:
        assert fitted[name] == pytest.approx(likeliest((name,), fitted["cow"]), abs=0.05)


def test_nothing_right_calibrates_nothing() -> None:
    truth = annotations("farm", NAMES, record(0, [(0, (0.0, 0.0, 10.0, 10.0))]))
    assert fit_scores(CocoScorer(truth), {}, NAMES) == FittedScores(calibration={})
    elsewhere = detections(NAMES, ("ant", 0.9, (50.0, 50.0, 60.0, 60.0)))
    assert fit_scores(CocoScorer(truth), {0: elsewhere}, NAMES) == FittedScores(calibration={})


def test_detections_are_shown_from_half_of_the_best_f1() -> None:
    """What calibrated scores promise is near what is best on other images, and no score promises more."""
    for seed in range(2):
        truth, found = played(seed)
        fitted = fit_scores(CocoScorer(truth), found, NAMES)
        assert fitted.threshold is not None
        others, more = played(seed + 10)
        moved, scorer = calibrated(more, fitted.calibration), CocoScorer(others)

        def shown(least: float, scorer: CocoScorer = scorer, moved: dict[int, Detections] = moved) -> OperatingPoint:
            thresholds = ScoreThresholds(default=least, same_place=None)
            point = diagnose(Judged.of(scorer, moved, NAMES, thresholds), thresholds).calibration.shown
            assert point is not None
            return point

        best = max(shown(least / 50).f1 for least in range(5, 30, 4))
        assert fitted.threshold == pytest.approx(best / 200, abs=0.04)
        assert shown(fitted.threshold).f1 > best - 1.5


def test_thresholds_stay_within_limits() -> None:
    box, sure = (0.0, 0.0, 10.0, 10.0), detections(NAMES, ("ant", 0.99, (0.0, 0.0, 10.0, 10.0)))
    records = [record(image, [(0, box)]) for image in range(200)]
    everything = fit_scores(CocoScorer(annotations("farm", NAMES, *records)), dict.fromkeys(range(200), sure), NAMES)
    assert everything.threshold == 0.5
    next_to_nothing = fit_scores(CocoScorer(annotations("farm", NAMES, *records)), {0: sure}, NAMES)
    assert next_to_nothing.threshold == 0.1


def test_what_was_applied_is_undone() -> None:
    """However often a detector is calibrated on the same images, the result is the same."""
    truth, found = played(3, images=20)
    once = fit_scores(CocoScorer(truth), found, NAMES).calibration
    again = fit_scores(CocoScorer(truth), calibrated(found, once), NAMES, once).calibration
    for name in NAMES:
        assert again[name] == pytest.approx(once[name], abs=0.02)


def test_the_mean_is_weighted_by_objects() -> None:
    one, two = (2.0, -1.0), (0.5, 0.25)
    assert mean_by_objects([(one, 30), (two, 10)]) == pytest.approx((1.625, -0.6875))
    assert mean_by_objects([(one, 0), (two, 0)]) == pytest.approx((1.25, -0.375))


def part(threshold: float, objects: int = 10, name: str = "cup") -> ModeReport:
    best = OperatingPoint(threshold=threshold, precision=80.0, recall=60.0)
    category = CategoryResult(name=name, objects=objects, ap=50.0, ap50=70.0, best=best)
    numbers = {"ap": 50.0, "ap50": 70.0, "ap75": 50.0, "ap_small": None, "ap_medium": None, "ap_large": 50.0}
    coco = CocoResult(**numbers, ar100=60.0, images=5, objects=objects, categories=(category,))
    return ModeReport(names=1, coco=coco, recall={})


def dataset(name: str, calibration: dict[str, Calibration], **parts: ModeReport) -> DatasetReport:
    bare = DatasetReport(name=name, split="val", domain=name, in_mean=True, images=5, missing=0)
    return replace(bare, calibration=calibration, **parts)


def test_a_name_of_several_datasets_has_the_mean_by_objects() -> None:
    desk = dataset("desk", {"cup": (1.0, 0.0), "lamp": (3.0, 1.0)}, own=part(0.2, 30))
    pond = dataset("pond", {"cup": (2.0, -1.0)}, own=part(0.6, 10))
    found = EvaluationReport(datasets=(desk, pond), names=2).calibration()
    assert found["cup"] == pytest.approx((1.25, -0.25))
    assert found["lamp"] == pytest.approx((3.0, 1.0))


def test_a_name_is_shown_from_the_mean_threshold_of_its_datasets() -> None:
    desk = replace(dataset("desk", {"cup": (1.0, 0.0), "lamp": (3.0, 1.0)}, own=part(0.2, 30)), threshold=0.2)
    pond = replace(dataset("pond", {"cup": (2.0, -1.0)}, own=part(0.6, 10)), threshold=0.4)
    older = dataset("shelf", {"book": (1.0, 0.0)}, own=part(0.5, name="book"))
    assert EvaluationReport(datasets=(desk, pond, older), names=3).thresholds() == {"cup": 0.25, "lamp": 0.2}


def test_the_table_tells_the_best_score_of_the_question_that_detection_asks() -> None:
    for modes in ({"own": 0.5}, {"own": 0.4, "joint": 0.5}, {"own": 0.4, "joint": 0.3, "default": 0.5}):
        one = dataset("desk", {}, **{mode: part(score) for mode, score in modes.items()})
        (row,) = (line for line in category_table(one).splitlines() if line.startswith("| cup"))
        assert "| 0.50 |" in row


def test_what_is_kept_replaces_what_was_kept_and_ends_old_thresholds(tiny_run: TinyRun, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_run.best)
    before = DetectionDefaults(calibration={"cup": (2.0, -1.0)}, thresholds={"cup": 0.4, "leaf": 0.2, "fish": 0.1})
    save_checkpoint(tmp_path / "own", replace(checkpoint, detection=before))
    report = EvaluationReport(
        datasets=(dataset("desk", {"cup": (0.5, 0.25), "leaf": (3.0, 1.0), "zebra": (1.0, 1.0)}),), names=3
    )
    store_calibration(report, tmp_path / "own")
    after = load_checkpoint(tmp_path / "own").detection
    assert after.calibration == {"cup": (0.5, 0.25), "leaf": (3.0, 1.0)}
    assert after.thresholds == {"fish": 0.1}
    both = replace(report, datasets=tuple(replace(one, threshold=0.35) for one in report.datasets))
    store_calibration(both, tmp_path / "own")
    assert load_checkpoint(tmp_path / "own").detection.thresholds == {"fish": 0.1, "cup": 0.35, "leaf": 0.35}
    with pytest.raises(DataError, match="no object of a trained name"):
        store_calibration(EvaluationReport(datasets=(dataset("desk", {}),), names=1), tmp_path / "own")


def test_scores_that_are_fitted_to_few_objects_are_told(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path / "own", load_checkpoint(tiny_run.best))
    for objects in (200, 4):
        one = dataset("desk", {"cup": (0.5, 0.25)}, own=part(0.5, objects))
        store_calibration(EvaluationReport(datasets=(one,), names=1), tmp_path / "own")
        assert ("fitted to 4 objects" in caplog.text) == (objects == 4)


def test_calibration_of_ones_own_wins_over_what_is_kept() -> None:
    own = InferenceConfig(postprocess=PostprocessConfig(calibration={"cup": (1.0, 1.0)}))
    config = suited(own, True, {"cup": (2.0, 2.0), "leaf": (3.0, 3.0)})
    assert config.postprocess.calibration == {"cup": (1.0, 1.0), "leaf": (3.0, 3.0)}
