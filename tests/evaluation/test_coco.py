import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from played import HEIGHT, WIDTH, annotations, detections, record

from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.errors import DataError
from metr.evaluation.coco import evaluate_detections
from metr.inference.postprocess import coco_results, write_coco_results
from metr.structures import Detections

NAMES = ("cat", "dog", "eel", "fox")
WHOLE = (0.0, 0.0, float(WIDTH), float(HEIGHT))


def random_dataset(seed: int = 3) -> tuple[dict, list[dict]]:
    """COCO files by hand: gaps in the ids, crowds, polygon areas, an empty image, a category without objects."""
    rng = np.random.default_rng(seed)
    categories = [{"id": number, "name": name} for number, name in zip((1, 7, 8, 90), NAMES, strict=True)]
    images = [{"id": 100 + 3 * i, "width": 400, "height": 300, "file_name": f"{i}.jpg"} for i in range(12)]
    objects, results = [], []
    for image in images[1:]:
        for _ in range(rng.integers(1, 9)):
            x, y, w, h = (rng.uniform(low, high) for low, high in ((0, 250), (0, 150), (8, 150), (8, 150)))
            category = int(rng.choice([1, 7, 8]))
            box = [float(side) for side in (x, y, w, h)]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": float(w * h * rng.uniform(0.4, 1.0)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 4)):
                moved = [float(side + rng.normal(0, 6)) for side in box]
                named = category if rng.random() < 0.8 else int(rng.choice([1, 7, 8, 90]))
                score = float(np.float32(rng.random()))
                results.append({"image_id": image["id"], "category_id": named, "bbox": moved, "score": score})
    return {"images": images, "annotations": objects, "categories": categories}, results


def corners(row: dict) -> list[float]:
    x, y, width, height = row["bbox"]
    return [x, y, x + width, y + height]


def as_ours(truth: dict, results: list[dict]) -> tuple[InMemoryAnnotations, dict[int | str, Detections]]:
    labels = {category["id"]: label for label, category in enumerate(truth["categories"])}
    records, found = [], {}
    for image in truth["images"]:
        here = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        records.append(
            ImageRecord(
                image_id=image["id"],
                path=Path(image["file_name"]),
                width=image["width"],
                height=image["height"],
                boxes=np.array([corners(row) for row in here], dtype=np.float64).reshape(-1, 4),
                labels=np.array([labels[row["category_id"]] for row in here], dtype=np.int64),
                areas=np.array([row["area"] for row in here], dtype=np.float64),
                ignore=np.array([row["iscrowd"] for row in here], dtype=bool),
            )
        )
        rows = [row for row in results if row["image_id"] == image["id"]]
        if rows:
            found[image["id"]] = Detections(
                boxes=torch.tensor([corners(row) for row in rows], dtype=torch.float64).reshape(-1, 4),
                scores=torch.tensor([row["score"] for row in rows]),
                labels=torch.tensor([labels[row["category_id"]] for row in rows], dtype=torch.int64),
                names=NAMES,
            )
    return InMemoryAnnotations(name="by hand", split="val", categories=NAMES, records=tuple(records)), found


@pytest.mark.parametrize("seed", [3, 4])
def test_equals_the_reference_run_straight_on_coco_files(seed: int, tmp_path: Path) -> None:
    truth, results = random_dataset(seed)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    reference = COCO(str(tmp_path / "truth.json"))
    run = COCOeval_faster(reference, reference.loadRes(str(tmp_path / "results.json")), "bbox")
    run.run()
    ours = evaluate_detections(*as_ours(truth, results))
    numbers = (ours.ap, ours.ap50, ours.ap75, ours.ap_small, ours.ap_medium, ours.ap_large)
    assert 5 < ours.ap < 95
    numbers = [-100 if number is None else number for number in numbers]  # the reference says -1 of what is not there
    np.testing.assert_allclose(numbers, run.stats[:6] * 100, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.ar100, run.stats[8] * 100, rtol=0, atol=1e-9)
    for number, category in enumerate(ours.categories[:3]):
        rows = [row for row in truth["annotations"] if row["category_id"] == (1, 7, 8)[number]]
        assert category.objects == sum(not row["iscrowd"] for row in rows)
        np.testing.assert_allclose(category.ap, run.eval["precision"][:, :, number, 0, 2].mean() * 100)
    assert (ours.categories[3].objects, ours.categories[3].ap, ours.categories[3].ap50) == (0, None, None)
    assert ours.objects == sum(not row["iscrowd"] for row in truth["annotations"])
    assert ours.images == 12


def test_perfect_detections_give_a_hundred() -> None:
    held = annotations(
        "set",
        ("cat", "dog"),
        record("a", [(0, (10, 10, 30, 30)), (1, (40, 40, 90, 75))]),
        record("b", [(1, (0, 0, 100, 80))]),
        record("empty", []),
    )
    found = {
        "a": detections(NAMES, ("cat", 0.9, (10, 10, 30, 30)), ("dog", 0.8, (40, 40, 90, 75))),
        "b": detections(NAMES, ("dog", 0.4, (0, 0, 100, 80))),
    }
    result = evaluate_detections(held, found)
    assert result.ap == pytest.approx(100)
    assert result.ar100 == pytest.approx(100)
    assert result.ap_small == pytest.approx(100)
    assert [category.ap for category in result.categories] == pytest.approx([100, 100])


def test_a_case_by_hand() -> None:
    """Two cats. Best first: hit (IoU 1), miss, hit (IoU 0.64, so up to the threshold 0.60).

    At IoU 0.50 to 0.60 precision is 1 at recalls up to 0.5 (51 of 101 points) and 2/3 above (50 points); at the seven
    other thresholds only the first hit stands.
    """
    held = annotations("set", ("cat",), record(1, [(0, (0, 0, 10, 10)), (0, (50, 50, 60, 60))]))
    found = {
        1: detections(
            ("cat",),
            ("cat", 0.9, (0.0, 0.0, 10.0, 10.0)),
            ("cat", 0.8, (20.0, 20.0, 30.0, 30.0)),
            ("cat", 0.7, (50.0, 50.0, 58.0, 58.0)),
        )
    }
    result = evaluate_detections(held, found)
    both, first = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert result.ap50 == pytest.approx(100 * both)
    assert result.ap75 == pytest.approx(100 * first)
    assert result.ap == pytest.approx(10 * (3 * both + 7 * first))
    assert result.ar100 == pytest.approx(10 * (3 * 1.0 + 7 * 0.5))


def test_crowds_are_neither_found_nor_missed() -> None:
    held = annotations("set", ("cat",), record(1, [(0, (0, 0, 20, 20)), (0, (40, 0, 100, 80))], crowds=[1]))
    inside = [("cat", 0.95, (45.0 + i, 5.0, 60.0 + i, 30.0)) for i in range(5)]
    result = evaluate_detections(held, {1: detections(("cat",), *inside, ("cat", 0.5, (0.0, 0.0, 20.0, 20.0)))})
    assert result.ap == pytest.approx(100)
    assert result.objects == result.categories[0].objects == 1


def test_foreign_names_are_no_mistakes_but_count_among_the_hundred() -> None:
    held = annotations("set", ("cat",), record(1, [(0, (0, 0, 20, 20))]))
    mine = ("cat", 0.5, (0.0, 0.0, 20.0, 20.0))
    for unannotated, expected in ((99, 100.0), (100, 0.0)):
        crowd = [("dog", 0.9, WHOLE)] * unannotated
        assert evaluate_detections(held, {1: detections(NAMES, *crowd, mine)}).ap == pytest.approx(expected)


def test_categories_that_nobody_annotated_in_a_image_are_not_judged_there() -> None:
    shown = [(0, (0.0, 0.0, 20.0, 20.0))]
    held = annotations("set", ("cat", "dog"), record(1, shown, annotated=(0,)), record(2, [(1, WHOLE)]))
    wrong = {
        1: detections(NAMES, ("dog", 0.9, WHOLE), ("cat", 0.5, (0.0, 0.0, 20.0, 20.0))),
        2: detections(NAMES, ("dog", 0.8, WHOLE)),
    }
    assert evaluate_detections(held, wrong).ap == pytest.approx(100)


def test_what_is_not_annotated_exhaustively_is_judged_as_lvis_does() -> None:
    """faster-coco-eval's own LVIS protocol, at all areas, against the annotated sets that say the same."""
    truth, results = random_dataset(seed=5)
    rng = np.random.default_rng(0)
    numbers = [category["id"] for category in truth["categories"]]
    truth["annotations"] = [{**row, "iscrowd": 0} for row in truth["annotations"]]
    shown = {image["id"]: set[int]() for image in truth["images"]}
    for row in truth["annotations"]:
        shown[row["image_id"]].add(row["category_id"])
    for image in truth["images"]:
        present = shown[image["id"]]
        image["not_exhaustive_category_ids"] = [number for number in present if rng.random() < 0.4]
        image["neg_category_ids"] = [number for number in numbers if number not in present and rng.random() < 0.5]
    annotated = {
        image["id"]: {*shown[image["id"]], *image["neg_category_ids"]} - {*image["not_exhaustive_category_ids"]}
        for image in truth["images"]
    }
    held, found = as_ours(truth, results)
    records = tuple(
        replace(record, annotated=tuple(numbers.index(number) for number in annotated[int(record.image_id)]))
        for record in held.records
    )
    assert any(shown[image] - annotated[image] for image in shown)
    ours = evaluate_detections(replace(held, records=records), found)

    truth["categories"] = [{**category, "frequency": "f"} for category in truth["categories"]]
    reference = COCO(truth)
    evaluation = COCOeval_faster(reference, reference.loadRes(results), "bbox", lvis_style=True)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]
    assert ours.ap == pytest.approx(100 * precision[precision > -1].mean())
    assert ours.ap != pytest.approx(evaluate_detections(held, found).ap)


def test_two_categories_with_one_name_are_one() -> None:
    held = annotations("set", ("cat", " cat"), record(1, [(0, (0, 0, 20, 20)), (1, (40, 40, 60, 60))]))
    found = {1: detections(NAMES, ("cat", 0.9, (0.0, 0.0, 20.0, 20.0)), ("cat", 0.8, (40.0, 40.0, 60.0, 60.0)))}
    result = evaluate_detections(held, found, names=("cat", "cat"))
    assert [(category.name, category.objects) for category in result.categories] == [("cat", 2)]
    assert result.ap == pytest.approx(100)


def test_nothing_found_is_nought_and_nothing_to_find_is_none() -> None:
    held = annotations("set", ("cat",), record(1, [(0, (0, 0, 20, 20))]))
    assert evaluate_detections(held, {}).ap == 0
    assert evaluate_detections(held, {1: detections(NAMES)}).ap == 0
    empty = annotations("set", ("cat",), record(1, []))
    result = evaluate_detections(empty, {1: detections(NAMES, ("cat", 0.9, WHOLE))})
    assert (result.ap, result.ap50, result.ar100, result.objects) == (None, None, None, 0)


def test_areas_are_those_of_the_record() -> None:
    held = annotations("set", ("cat",), record(1, [(0, (0, 0, 60, 60))], areas=[900.0]))
    result = evaluate_detections(held, {1: detections(NAMES, ("cat", 0.9, (0.0, 0.0, 60.0, 60.0)))})
    assert (result.ap_small, result.ap_medium) == (pytest.approx(100), None)


def test_detections_must_belong_to_the_annotations() -> None:
    held = annotations("set", ("cat",), record(1, []), record(2, []))
    with pytest.raises(DataError, match="not in this split, the first is 7"):
        evaluate_detections(held, {7: detections(NAMES)})
    with pytest.raises(DataError, match="2 images share 1 image ids"):
        evaluate_detections(annotations("set", ("cat",), record(1, []), record(1, [])), {})
    with pytest.raises(DataError, match="a name for each of 1 categories"):
        evaluate_detections(held, {}, names=("cat", "dog"))


def test_results_files_are_in_coco_form(tmp_path: Path) -> None:
    found = {12: detections(NAMES, ("fox", 0.123456789, (1.0, 2.0, 4.125, 7.0)), ("eel", 0.1, WHOLE))}
    write_coco_results(tmp_path / "deep" / "results.json", found, {"fox": 90, "cat": 1})
    rows = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert rows == [{"image_id": 12, "category_id": 90, "bbox": [1.0, 2.0, 3.12, 5.0], "score": 0.12346}]
    assert len(coco_results(found, {"fox": 1, "eel": 2}, max_detections=1)) == 1


def overlap(a: list[float], b: list[float]) -> float:
    width = max(min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]), 0.0)
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def counted(truth: dict, results: list[dict], category: int) -> list[tuple[float, float, float]]:
    """Score, precision and recall after each detection of a category, best first, matched one after the other."""
    free = {n: row for n, row in enumerate(truth["annotations"]) if row["category_id"] == category}
    objects, points, hits = len(free), [], 0
    for number, found in enumerate(
        sorted((r for r in results if r["category_id"] == category), key=lambda r: -r["score"]), 1
    ):
        near = {
            n: overlap(row["bbox"], found["bbox"]) for n, row in free.items() if row["image_id"] == found["image_id"]
        }
        best = max(near, key=lambda n: near[n], default=None)
        if best is not None and near[best] >= 0.5:
            del free[best]
            hits += 1
        points.append((found["score"], 100 * hits / number, 100 * hits / objects))
    return points


def harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / max(precision + recall, 1e-9)


@pytest.mark.parametrize("most", [100, 6])
def test_the_threshold_lies_between_that_of_the_category_and_that_of_all(most: int) -> None:
    """The more objects the category has, the nearer it is to its own, which counting finds."""
    truth, results = random_dataset(5)
    counts, kept = dict.fromkeys((1, 7, 8), 0), []
    for row in truth["annotations"]:
        counts[row["category_id"]] += 1
        if counts[row["category_id"]] <= most:
            kept.append(row | {"iscrowd": 0})
    truth |= {"annotations": kept}
    annotations, found = as_ours(truth, results)
    parts = {part.name: part.best for part in evaluate_detections(annotations, found).categories}
    assert parts.pop("fox") is None  # it has no objects
    curves = {number: counted(truth, results, number) for number in (1, 7, 8)}

    def f1_at(curve: list[tuple[float, float, float]], score: float) -> float:
        above = [point for point in curve if point[0] >= score]
        return harmonic(*above[-1][1:]) if above else 0.0

    candidates = sorted({round(row["score"], 3) for row in results})
    means = [np.mean([f1_at(curve, score) for curve in curves.values()]) for score in candidates]
    shared = {score for score, mean in zip(candidates, means, strict=True) if mean >= max(means) - 3.0}
    for curve, (name, point), number in zip(curves.values(), parts.items(), counts.values(), strict=True):
        assert point is not None, name
        objects = min(number, most)
        best = max(harmonic(p, r) for _, p, r in curve)
        own = {score for score, p, r in curve if harmonic(p, r) >= best - 3.0}  # recall is sampled in hundredths
        possible = [(objects * one + 10 * all_) / (objects + 10) for one in own for all_ in shared]
        assert min(abs(point.threshold - value) for value in possible) < 2e-3
        above = [entry for entry in curve if entry[0] >= point.threshold]
        # the protocol's precision is the best at this recall or a higher one
        assert point.recall == pytest.approx(above[-1][2], abs=1.0)
        assert point.precision >= above[-1][1] - 1.0


def test_nothing_found_has_no_threshold() -> None:
    annotations, _ = as_ours(*random_dataset(5))
    assert all(part.best is None for part in evaluate_detections(annotations, {}).categories)
