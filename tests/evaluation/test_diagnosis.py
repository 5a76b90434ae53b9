"""Error kinds, calibration and confusion: against faster-coco-eval, hotcoco, and the definitions written out."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from played import HEIGHT, WIDTH, annotations, detections, record

from metr.data.records import InMemoryAnnotations
from metr.evaluation.coco import CocoScorer
from metr.evaluation.diagnosis import Diagnosis, Judged, diagnose, precision_curves
from metr.evaluation.matching import Case, Kind, judge
from metr.inference.postprocess import ScoreThresholds
from metr.structures import Detections

NAMES = ("ant", "bee", "cow")
EVERYTHING = ScoreThresholds(default=0.0, same_place=None)


def scattered(seed: int, crowds: bool) -> tuple[InMemoryAnnotations, dict[int, Detections]]:
    """Images with objects, and detections around them: right, shifted, misnamed, doubled, elsewhere."""
    rng = np.random.default_rng(seed)
    records, found = [], {}
    for image in range(8):
        objects, rows = [], []
        for _ in range(int(rng.integers(0, 6))):
            label, left, top = int(rng.integers(3)), *rng.uniform(0, 50, 2)
            width, height = rng.uniform(8, 28, 2)
            objects.append((label, (left, top, left + width, top + height)))
            for _ in range(int(rng.integers(0, 4))):
                said = label if rng.random() < 0.6 else int(rng.integers(3))
                shift = rng.normal(0, rng.choice([1.0, 5.0]), 4)
                box = np.array([left, top, left + width, top + height]) + shift
                box[2:] = np.maximum(box[2:], box[:2] + 3)
                rows.append((NAMES[said], float(rng.random()), tuple(box.tolist())))
        for _ in range(2):
            left, top = rng.uniform(0, 60, 2)
            rows.append((NAMES[int(rng.integers(3))], float(rng.random()), (left, top, left + 12, top + 12)))
        some = [number for number in range(len(objects)) if crowds and rng.random() < 0.2]
        records.append(record(image, objects, crowds=some))
        found[image] = detections(NAMES, *sorted(rows, key=lambda row: -row[1]))
    return annotations("farm", NAMES, *records), found


def judged(
    truth: InMemoryAnnotations,
    found: dict[int, Detections],
    thresholds: ScoreThresholds = EVERYTHING,
    names: tuple[str, ...] = NAMES,
) -> Judged:
    return Judged.of(CocoScorer(truth), found, names, thresholds)


def share(diagnosis: Diagnosis, kind: str) -> tuple[float, int]:
    (one,) = (error for error in diagnosis.errors if error.kind == kind)
    return one.lost, one.shown


@pytest.mark.parametrize("seed", range(3))
def test_the_best_score_is_the_best_of_all(seed: int) -> None:
    """Against showing the detections from every score on that one of them has."""
    truth, found = scattered(seed, crowds=True)
    calibration = diagnose(judged(truth, found), EVERYTHING).calibration
    points = {}
    for score in sorted({value for one in found.values() for value in one.scores.tolist()}):
        thresholds = ScoreThresholds(default=score, same_place=None)
        shown = diagnose(judged(truth, found, thresholds), thresholds).calibration.shown
        assert shown is not None
        points[score] = shown
    best = max(points.values(), key=lambda point: point.f1)
    assert calibration.best is not None
    assert calibration.best.threshold == pytest.approx(best.threshold, abs=1e-6)
    assert (calibration.best.precision, calibration.best.recall) == pytest.approx((best.precision, best.recall))
    assert calibration.shown == replace(points[min(points)], threshold=0.0)
    assert diagnose(judged(truth, {}), EVERYTHING).calibration.best is None


@pytest.mark.parametrize("seed", range(6))
def test_precision_and_hits_are_those_of_the_protocol(seed: int) -> None:
    truth, found = scattered(seed, crowds=True)
    expected = CocoScorer(truth).score(found)
    curves = precision_curves(judged(truth, found))
    for row, category in zip(curves, expected.categories, strict=True):
        if category.ap50 is None:
            assert np.isnan(row).all()
        else:
            assert 100 * row.mean() == pytest.approx(category.ap50, abs=1e-6)


def hotcoco_of(truth: InMemoryAnnotations, found: dict[int, Detections]):
    """The same data in hotcoco, evaluated."""
    hotcoco = pytest.importorskip(
        "hotcoco", reason="needs hotcoco, the reference for error kinds (pip install 'metr[dev]')"
    )
    scorer = CocoScorer(truth)
    reference = hotcoco.COCO(scorer.truth)
    rows = [
        {
            "image_id": scorer.image_numbers[image],
            "category_id": label + 1,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        for image, one in found.items()
        for box, score, label in zip(one.boxes.double().tolist(), one.scores.tolist(), one.labels.tolist(), strict=True)
    ]
    evaluation = hotcoco.COCOeval(reference, reference.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(6))
def test_error_kinds_are_those_of_hotcoco(seed: int) -> None:
    truth, found = scattered(seed, crowds=False)
    theirs = hotcoco_of(truth, found)
    assert 100 * theirs.stats[0] == pytest.approx(CocoScorer(truth).score(found).ap, abs=1e-6)
    tide, mine = theirs.tide_errors(), diagnose(judged(truth, found), EVERYTHING)
    names = {"name": "Cls", "place": "Loc", "both": "Both", "duplicate": "Dupe", "background": "Bkg", "missed": "Miss"}
    assert {kind: share(mine, kind)[1] for kind in names} == {
        ours: tide["counts"][kind] for ours, kind in names.items()
    }
    for ours, kind in names.items():
        assert share(mine, ours)[0] == pytest.approx(100 * tide["delta_ap"][kind], abs=1e-6), kind


@pytest.mark.parametrize("seed", range(4))
def test_calibration_is_that_of_hotcoco(seed: int) -> None:
    truth, found = scattered(seed, crowds=True)
    theirs = hotcoco_of(truth, found).calibration()
    mine = diagnose(judged(truth, found), EVERYTHING).calibration
    assert mine.error == pytest.approx(theirs["ece"], abs=1e-9)
    assert [one.count for one in mine.bins] == [one["count"] for one in theirs["bins"]]
    for one, other in zip(mine.bins, theirs["bins"], strict=True):
        assert (one.score or 0.0) == pytest.approx(other["avg_confidence"])
        assert (one.right or 0.0) == pytest.approx(other["avg_accuracy"])


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Of two boxes x, y, width, height."""
    sides = [
        max(0.0, min(one[axis] + one[axis + 2], other[axis] + other[axis + 2]) - max(one[axis], other[axis]))
        for axis in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def kinds_by_definition(case: Case) -> list[Kind]:
    """TIDE's kinds, detection by detection, object by object, without crowds."""
    taken: set[int] = set()
    kinds: list[Kind] = []
    for box, label in zip(case.boxes, case.found.tolist(), strict=True):
        apart = [iou(box, thing) for thing in case.objects]
        own = [apart[n] if case.labels[n] == label else 0.0 for n in range(len(apart))]
        other = [apart[n] if case.labels[n] != label else 0.0 for n in range(len(apart))]
        free = [n for n in range(len(apart)) if n not in taken and own[n] >= 0.5]
        if free:
            taken.add(max(free, key=lambda n: own[n]))
            kinds.append(Kind.FOUND)
        elif 0.1 <= max(own, default=0.0) < 0.5:
            kinds.append(Kind.PLACE)
        elif max(other, default=0.0) >= 0.5:
            kinds.append(Kind.NAME)
        elif max(own, default=0.0) >= 0.5:
            kinds.append(Kind.DUPLICATE)
        elif max(other, default=0.0) > 0.1:
            kinds.append(Kind.BOTH)
        else:
            kinds.append(Kind.BACKGROUND)
    return kinds


@pytest.mark.parametrize("seed", range(20))
def test_kinds_are_those_of_the_definition(seed: int) -> None:
    for case in judged(*scattered(seed, crowds=False)).every:
        assert judge(case).kind.tolist() == [int(kind) for kind in kinds_by_definition(case)]


@pytest.mark.parametrize("seed", range(10))
def test_confusion_is_a_pairing_of_best_first(seed: int) -> None:
    truth, found = scattered(seed, crowds=True)
    confusion = diagnose(judged(truth, found), EVERYTHING).confusion
    pairs: Counter[tuple[str, str]] = Counter()
    unseen: Counter[str] = Counter()
    for case in judged(truth, found).every:
        left = [n for n in range(len(case.objects)) if not case.crowd[n]]
        for box, label in zip(case.boxes, case.found.tolist(), strict=True):
            here = [n for n in left if iou(box, case.objects[n]) >= 0.5]
            same = [n for n in here if case.labels[n] == label] or here
            if same:
                best = max(same, key=lambda n: iou(box, case.objects[n]))
                pairs[NAMES[case.labels[best]], NAMES[label]] += 1
                left.remove(best)
        unseen.update(NAMES[case.labels[n]] for n in left)
    assert {(true, said): number for true, said, number in confusion.pairs} == pairs
    assert confusion.unseen == unseen


def test_a_name_of_another_dataset_is_no_error_but_a_confusion() -> None:
    truth = annotations("farm", NAMES, record(0, [(0, (10, 10, 40, 40)), (1, (60, 10, 90, 40))]))
    names = (*NAMES, "ship")
    found = {
        0: detections(
            names, ("ship", 0.9, (10, 10, 40, 40)), ("bee", 0.8, (60, 10, 90, 40)), ("ship", 0.7, (5, 60, 20, 75))
        )
    }
    mine = diagnose(judged(truth, found, names=names), EVERYTHING)
    assert mine.confusion.pairs == (("ant", "ship", 1), ("bee", "bee", 1))
    assert (mine.confusion.unseen, mine.confusion.invented) == ({}, {})
    assert [one.shown for one in mine.errors] == [0, 0, 0, 0, 0, 1]
    assert [(one.name, one.objects, one.found) for one in mine.names] == [("ant", 1, 0), ("bee", 1, 1), ("cow", 0, 0)]


def test_what_an_image_does_not_annotate_is_neither_right_nor_wrong() -> None:
    one = record(0, [(0, (10, 10, 40, 40)), (1, (60, 10, 90, 40))], annotated=(0,))
    two = record(1, [(2, (0, 0, WIDTH, HEIGHT))], annotated=(0, 1, 2))
    truth = annotations("farm", NAMES, one, two)
    elsewhere = (5, 50, 20, 75)
    found = {0: detections(NAMES, ("ant", 0.9, elsewhere), ("bee", 0.8, elsewhere), ("cow", 0.7, elsewhere))}
    (first, _) = judged(truth, found).verdicts
    assert first.kind.tolist() == [Kind.BACKGROUND, Kind.UNCOUNTED, Kind.UNCOUNTED]
    assert first.missed.tolist()[:2] == [True, True]


def test_nothing_found_and_nothing_there() -> None:
    truth = annotations("farm", NAMES, record(0, []), record(1, []))
    nothing = diagnose(judged(truth, {}), EVERYTHING)
    assert nothing.calibration.error is None
    assert all((one.lost, one.shown) == (0.0, 0) for one in nothing.errors)
    something = diagnose(judged(truth, {1: detections(NAMES, ("ant", 0.9, (10, 10, 40, 40)))}), EVERYTHING)
    assert share(something, "background") == (0.0, 1)
    assert something.confusion.invented == {"ant": 1}


def test_shown_are_those_over_the_threshold_of_their_name_with_one_name_for_each_place() -> None:
    truth = annotations("farm", NAMES, record(0, [(0, (10, 10, 40, 40)), (1, (60, 10, 90, 40))]))
    rows = ("ant", 0.9, (10, 10, 40, 40)), ("bee", 0.8, (11, 10, 40, 40)), ("bee", 0.4, (60, 10, 90, 40))
    thresholds = ScoreThresholds(names={"bee": 0.5})
    mine = diagnose(judged(truth, {0: detections(NAMES, *rows)}, thresholds), thresholds)
    assert [(one.name, one.threshold, one.found) for one in mine.names] == [
        ("ant", 0.3, 1),
        ("bee", 0.5, 0),
        ("cow", 0.3, 0),
    ]
    assert mine.confusion.pairs == (("ant", "ant", 1),)
    assert mine.confusion.unseen == {"bee": 1}
    assert [one.kind for one in mine.errors if one.shown] == ["missed"]
    assert sum(one.count for one in mine.calibration.bins) == 3
