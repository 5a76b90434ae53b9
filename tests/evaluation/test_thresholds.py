"""The scores from which detections are shown, as evaluations choose and store them."""

from dataclasses import replace

import pytest

from metr.evaluation.coco import CategoryResult, CocoResult, OperatingPoint
from metr.evaluation.report import category_table
from metr.evaluation.results import DatasetReport, EvaluationReport, ModeReport


def part(threshold: float, objects: int = 10, name: str = "cup") -> ModeReport:
    best = OperatingPoint(threshold=threshold, precision=80.0, recall=60.0)
    category = CategoryResult(name=name, objects=objects, ap=50.0, ap50=70.0, best=best)
    coco = CocoResult(
        ap=50.0,
        ap50=70.0,
        ap75=50.0,
        ap_small=None,
        ap_medium=None,
        ap_large=50.0,
        ar100=60.0,
        images=5,
        objects=objects,
        categories=(category,),
    )
    return ModeReport(names=1, coco=coco, recall={})


def dataset(name: str, **parts: ModeReport) -> DatasetReport:
    bare = DatasetReport(name=name, split="val", domain=name, in_mean=True, images=5, missing=0)
    return replace(bare, **parts)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"own": 0.5}, 0.5),
        ({"own": 0.5, "joint": 0.4}, 0.4),
        ({"own": 0.5, "joint": 0.4, "default": 0.3}, 0.3),
        ({"joint": 0.4}, 0.4),
    ],
)
def test_thresholds_are_those_of_the_question_that_detection_asks(modes: dict[str, float], expected: float) -> None:
    report = EvaluationReport(
        datasets=(dataset("desk", **{mode: part(score) for mode, score in modes.items()}),), names=1
    )
    assert report.thresholds() == {"cup": expected}
    (row,) = (line for line in category_table(report.datasets[0]).splitlines() if line.startswith("| cup"))
    assert f"| {expected:.2f} |" in row


def test_a_name_of_several_datasets_has_the_mean_by_objects() -> None:
    one, two = dataset("desk", own=part(0.2, 30)), dataset("pond", own=part(0.6, 10))
    assert EvaluationReport(datasets=(one, two), names=1).thresholds() == {"cup": pytest.approx(0.3)}


def test_a_split_of_few_objects_chooses_no_threshold() -> None:
    """What occurs there alone takes the mean of all other names; with nothing else there is none, which means 0.3."""
    tiny, desk, pond = (
        dataset("tiny", own=part(0.95, 9, "frog")),
        dataset("desk", own=part(0.2, 30)),
        dataset("pond", own=part(0.6, 10, "fish")),
    )
    assert EvaluationReport(datasets=(tiny,), names=1).thresholds() == {}
    found = EvaluationReport(datasets=(tiny, desk, pond), names=3).thresholds()
    assert found == {"frog": pytest.approx(0.3), "cup": 0.2, "fish": 0.6}
    again = dataset("again", own=part(0.9, 3))
    assert EvaluationReport(datasets=(again, desk), names=1).thresholds() == {"cup": 0.2}, "its own of another split"
