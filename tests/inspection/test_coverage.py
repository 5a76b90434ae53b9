"""The coverage matrix, and what a detector sees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from inspection_datasets import dataset_facts, name_facts

from metr.data.records import ImageRecord
from metr.inspection.coverage import Coverage, Homonym, coverage_of
from metr.inspection.detector_hints import (
    DetectorHints,
    HintCollector,
    RenamedHint,
    UnlabelledHint,
    confidence_floors,
    similar_by_detector,
)
from metr.inspection.facts import DatasetFacts
from metr.inspection.similar_names import SimilarNames
from metr.structures import Detections


def photos_and_animals() -> list[DatasetFacts]:
    with_bear = [["bear", "person"]] * 3 + [["bear"]] * 2 + [["bear", "cup"]]
    photos = dataset_facts("photos", ["bear", "person", "cup"], [*with_bear, ["cup", "person"], ["cup"]])
    return [photos, dataset_facts("animals", [name_facts("bear", 7, annotated=0.5), "deer"], [["bear"], ["deer"]])]


def hints(coverage: Coverage) -> dict[tuple[str, str], list[str]]:
    return {
        (dataset, name): [hint.kind for hint in cell.hints]
        for dataset in coverage.datasets
        for name, cell in coverage.hinted(dataset)
    }


def test_annotated_and_absent() -> None:
    coverage = coverage_of(photos_and_animals(), (), (), None)
    assert (coverage.cell("photos", "bear").boxes, coverage.cell("photos", "bear").partly) == (10, False)
    assert (coverage.cell("animals", "bear").boxes, coverage.cell("animals", "bear").partly) == (7, True)
    assert coverage.cell("photos", "deer") == coverage.cell("nowhere", "nothing")
    assert coverage.telling() == ["bear", "person"]  # most annotated first


def test_what_stands_beside_common_names() -> None:
    """A person is in 3 of 6 images with bears, a cup in one only: no hint."""
    coverage = coverage_of(photos_and_animals(), (), (), None)
    assert hints(coverage) == {("animals", "person"): ["beside"]}
    (hint,) = coverage.cell("animals", "person").hints
    assert hint.strength == pytest.approx(0.5)
    assert hint.why == "in photos it is in 3 of 6 images with bear"


def test_a_doubted_name_is_no_bridge() -> None:
    homonym = Homonym(name="bear", dataset="animals", others=("bear",), other="photos", reasons=("so",))
    assert hints(coverage_of(photos_and_animals(), (), [homonym], None)) == {}


def test_what_is_annotated_under_another_name_is_not_missing() -> None:
    photos, animals = photos_and_animals()
    animals = dataset_facts("animals", [*animals.names.values(), "pedestrian"], [["bear"]])
    assert hints(coverage_of([photos, animals], (), (), None)) == {("animals", "person"): ["beside"]}
    owners = (("photos",), ("animals",))
    near = SimilarNames(names=("person", "pedestrian"), owners=owners, kind="embedding", why="near in meaning")
    assert hints(coverage_of([photos, animals], [near], (), None)) == {}
    # other signs than stop signs may well stand unlabelled
    road = dataset_facts("road", ["car", "stop sign"], [["car"]])
    hall = dataset_facts("hall", ["car", "sign"], [["car", "sign"]] * 6)
    kind = SimilarNames(names=("stop sign", "sign"), owners=(("road",), ("hall",)), kind="embedding", why="near")
    assert hints(coverage_of([road, hall], [kind], (), None)) == {("road", "sign"): ["beside"]}


# A detector -----------------------------------------------------------------------------------------------------------

NAMES = ("person", "bear", "deer")


def record(path: str, boxes: list[list[float]], labels: list[int], ignore: list[bool] | None = None) -> ImageRecord:
    return ImageRecord(
        image_id=path,
        path=Path(path),
        width=100,
        height=100,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        areas=np.ones(len(boxes), dtype=np.float32),
        ignore=np.array(ignore or [False] * len(boxes), dtype=bool),
    )


def detections(*found: tuple[str, float, list[float]]) -> Detections:
    return Detections(
        boxes=torch.tensor([box for _, _, box in found], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([score for _, score, _ in found]),
        labels=torch.tensor([NAMES.index(name) for name, _, _ in found], dtype=torch.int64),
        names=NAMES,
    )


LEFT, RIGHT, BETWEEN = [0, 0, 40, 40], [60, 60, 100, 100], [10, 0, 50, 70]


def test_seen_apart_from_all_boxes() -> None:
    collector = HintCollector("animals", ("bear", "deer"))
    collector.add(record("1.png", [LEFT], [0]), detections(("person", 0.9, RIGHT), ("person", 0.4, [60, 0, 100, 40])))
    collector.add(record("2.png", [LEFT], [0]), detections(("person", 0.6, RIGHT), ("deer", 0.9, RIGHT)))
    collector.add(record("3.png", [LEFT], [0]), detections(("person", 0.9, BETWEEN)))  # overlaps by a third: neither
    collector.add(record("4.png", [], []), detections(("person", 0.3, RIGHT)))
    collector.add(record("5.png", [], []), detections())
    (seen,) = collector.unlabelled({"person": 0.5})
    assert seen == UnlabelledHint(dataset="animals", name="person", images=2, of=5, example=Path("1.png"))
    assert collector.unlabelled({"person": 0.2})[0].images == 3
    assert collector.unlabelled({}) == []  # a name that it does not find where it is annotated


def test_boxes_called_by_a_foreign_name() -> None:
    collector = HintCollector("animals", ("bear", "deer"))
    for number in range(6):
        name = "person" if number else "bear"
        collector.add(
            record(f"{number}.png", [LEFT, RIGHT], [0, 1]), detections((name, 0.8, LEFT), ("deer", 0.7, RIGHT))
        )
    collector.add(record("7.png", [LEFT], [0], [True]), detections(("person", 0.8, LEFT)))  # an ignored box is nobody's
    assert collector.unlabelled({"person": 0.5}) == []
    assert collector.called({"person": 0.5}) == [
        RenamedHint(dataset="animals", name="bear", called="person", boxes=5, of=6)
    ]
    assert collector.called({"person": 0.85}) == []
    assert dict(collector.found) == {"bear": [pytest.approx(0.8)], "deer": [pytest.approx(0.7)] * 6}
    assert confidence_floors([collector]) == {"deer": pytest.approx(0.7)}  # one bear is too few


def test_images_that_are_strange_to_the_detector() -> None:
    """Whoever does not find a dataset's own objects says nothing about others in its images."""
    collector = HintCollector("animals", ("bear", "deer"))
    for number in range(40):
        collector.add(record(f"{number}.png", [LEFT], [0]), detections(("person", 0.9, RIGHT)))
    assert not collector.knows_dataset
    for number in range(3):
        collector.add(record(f"more {number}.png", [LEFT], [0]), detections(("bear", 0.9, LEFT)))
    assert not collector.knows_dataset  # 3 of 43
    for number in range(3):
        collector.add(record(f"most {number}.png", [LEFT], [0]), detections(("bear", 0.9, LEFT)))
    assert collector.knows_dataset  # 6 of 46


def test_sightings_are_the_evidence() -> None:
    detector_hints = DetectorHints(
        model="runs/joint",
        unlabelled=(
            UnlabelledHint(dataset="animals", name="person", images=3, of=30, example=Path("train/1.png")),
            UnlabelledHint(dataset="animals", name="cup", images=1, of=30, example=Path("train/2.png")),
            UnlabelledHint(dataset="photos", name="deer", images=2, of=50, example=Path("3.png")),
        ),
        called=(RenamedHint(dataset="animals", name="deer", called="person", boxes=5, of=8),),
        images={"animals": 30, "photos": 30},
        unreliable=("cup",),
        unknown=("cells", "pages"),
    )
    coverage = coverage_of(photos_and_animals(), (), (), detector_hints)
    assert hints(coverage) == {("animals", "person"): ["seen"]}  # once may be an error, and so may 4 %
    assert coverage.cell("animals", "person").hints[0].why == "seen in 3 of 30 images, such as train/1.png"
    assert "seen by runs/joint" in coverage.evidence
    assert "1 name" in coverage.evidence
    assert "no hints about cells, pages, whose own boxes it hardly finds" in coverage.evidence
    (near,) = similar_by_detector(detector_hints, {"person": ("photos",), "deer": ("animals",)})
    assert (near.names, near.kind) == (("deer", "person"), "detector")
    assert near.why == "5 of 8 boxes are seen as person"
