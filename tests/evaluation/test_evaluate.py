"""The verb evaluate: own names and the joint vocabulary, on datasets that training saw and on others."""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from metr.data.images import read_image
from metr.data.joint import open_joint
from metr.errors import DataError
from metr.evaluation.coco import evaluate_detections
from metr.evaluation.results import EvaluationConfig, EvaluationReport, from_dict
from metr.evaluation.runner import evaluate
from metr.inference.config import InferenceConfig
from metr.model import METR

from tiny import NAMES, TinyRun


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def report(tiny_run: TinyRun, out: Path) -> EvaluationReport:
    with (out / "said").open("w", encoding="utf-8") as said:
        return evaluate(tiny_run.folder, tiny_run.data, out / "e", console=Console(file=said, width=80))


def test_json_markdown_and_chart_are_written(report: EvaluationReport, out: Path) -> None:
    written = json.loads((out / "e/evaluation.json").read_text(), parse_constant=pytest.fail)
    assert all(math.isfinite(number) for number in numbers(written))
    assert from_dict({key: value for key, value in written.items() if key != "mean"}) == report
    page = (out / "e/evaluation.md").read_text()
    for name in {name for names in NAMES.values() for name in names}:
        assert f"| {name} |" in page
    assert "counted as absent in training (`unannotated = negative`)" in page
    assert read_image(out / "e/evaluation.png").shape[2] == 3


def test_every_dataset_is_judged_with_own_and_with_all_names(report: EvaluationReport) -> None:
    assert [one.name for one in report.datasets] == list(NAMES)
    assert report.names == 10
    for one in report.datasets:
        assert one.own is not None
        assert one.joint is not None
        assert (one.split, one.images, one.missing) == ("val", 3, 0)
        assert (one.own.names, one.joint.names) == (len(NAMES[one.name]), 10)
        assert tuple(category.name for category in one.own.coco.categories) == NAMES[one.name]
    assert report.confusion is not None


def test_it_agrees_with_detection_image_by_image(report: EvaluationReport, tiny_run: TinyRun) -> None:
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    for name, annotations in open_joint(tiny_run.data).evaluation().items():
        records = [annotations[index] for index in range(len(annotations))]
        # as the protocol wants it: what people are shown keeps one name a place
        predictor = model.predictor(list(NAMES[name]), InferenceConfig())
        found = {record.image_id: predictor.detect(record.path) for record in records}
        expected = evaluate_detections(annotations, found)
        (one,) = (one for one in report.datasets if one.name == name)
        assert one.own is not None
        assert (one.own.coco.objects, one.own.coco.images) == (expected.objects, 3)
        assert one.own.coco.ar100 == pytest.approx(expected.ar100, abs=1e-6)
        assert one.own.coco.ap == pytest.approx(expected.ap, abs=1e-6)


def test_the_table_fits_80_columns(report: EvaluationReport, out: Path) -> None:
    lines = (out / "said").read_text().splitlines()
    assert max(map(len, lines)) <= 80 or all(str(out) in line for line in lines if len(line) > 80)
    assert any(line.endswith("images own AP own AP50 joint AP joint AP50 confused") for line in lines)
    (pond,) = (line for line in lines if "pond" in line)
    assert pond.split()[:3] == ["pond", "val", "3"]
    assert len(pond.split()) == 8
    assert any(line.split()[:3] == ["mean", "of", "3"] for line in lines)


def test_names_that_the_model_never_saw(tiny_run: TinyRun, tmp_path: Path) -> None:
    strange = write_csv(tmp_path / "strange", tiny_run.unseen)
    report = evaluate(tiny_run.folder, [str(strange)], tmp_path / "e", split="train")
    (one,) = report.datasets
    assert one.own is not None
    assert [category.name for category in one.own.coco.categories] == ["leaf", "zebra"]
    assert (one.split, one.own.coco.objects) == ("train", 2)
    # the joint vocabulary: names of training are asked for as well, and their domains take part
    assert report.names == 11
    assert report.confusion is not None
    assert set(report.confusion.domains) == {"strange", *NAMES}


def test_a_dataset_of_the_same_name_does_not_hide_names_of_training(tiny_run: TinyRun, tmp_path: Path) -> None:
    strange = write_csv(tmp_path / "strange", tiny_run.unseen)
    assert evaluate(tiny_run.folder, [f"pond={strange}"], tmp_path / "e", split="train").names == 11


def test_names_in_another_case_are_the_trained_ones(
    report: EvaluationReport, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """As for detection: capital letters make no other name, and what was trained is what is asked."""
    name, trained = next(iter(NAMES.items()))
    dataset = {"path": str(tiny_run.datasets[0]), "name": name, "renames": {one: one.upper() for one in trained}}
    (tmp_path / "loud.yaml").write_text(json.dumps({"datasets": [dataset]}))
    found = evaluate(tiny_run.folder, [str(tmp_path / "loud.yaml"), *tiny_run.data[1:]])
    assert found.names == report.names
    assert found.datasets[0].own == report.datasets[0].own
    assert found.datasets[0].joint == report.datasets[0].joint


def test_prompts_of_a_listing_are_what_is_embedded(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(tmp_path / "strange", tiny_run.unseen)
    listing = tmp_path / "list.yaml"
    listing.write_text("datasets: [{path: strange, prompts: {zebra: a striped horse}}]", encoding="utf-8")
    asked: dict[str, str] = {}

    def embed(self: METR, names: Any) -> Any:
        asked.update(names.prompts)
        return original(self, names)

    original = METR.embed
    monkeypatch.setattr(METR, "embed", embed)
    evaluate(tiny_run.folder, [str(listing)], tmp_path / "e", split="train")
    assert asked == {"zebra": "a striped horse"}


def test_a_dataset_outside_the_mean_is_told_beside_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = EvaluationConfig(outside_mean=("pond",), modes=("own",))
    with (tmp_path / "said").open("w", encoding="utf-8") as said:
        report = evaluate(
            tiny_run.folder, tiny_run.data, tmp_path / "e", config=config, console=Console(file=said, width=80)
        )
    assert report.confusion is None
    text = (tmp_path / "said").read_text()
    assert "(pond)" in text
    assert "mean of 2" in text
    assert "joint AP" not in text


def test_a_broken_image_is_in_no_number(tiny_run: TinyRun, tmp_path: Path) -> None:
    pond = Path(shutil.copytree(tiny_run.datasets[0], tmp_path / "pond"))
    next(iter(sorted((pond / "val").glob("*.jpg")))).write_bytes(b"")
    (one,) = evaluate(tiny_run.folder, [str(pond)], tmp_path / "e").datasets
    assert (one.images, one.missing) == (2, 1)


def test_all_images_of_a_dataset_without_splits(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = write_csv(tmp_path / "strange", tiny_run.unseen)
    (strange / "val.csv").unlink()
    caplog.set_level(logging.INFO)
    (part,) = evaluate(tiny_run.folder, [str(strange)], tmp_path / "e", allow_empty=True).datasets
    assert "strange: evaluated on the held-out images alone; --split all takes all images" in caplog.text
    caplog.clear()
    (whole,) = evaluate(tiny_run.folder, [str(strange)], tmp_path / "e", split="all").datasets
    assert (part.split, part.images, whole.split, whole.images) == ("val", 1, "all", 2)
    assert "held" not in caplog.text


def test_a_split_that_is_not_there(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no 'test' split\n  try: it has train, val"):
        evaluate(tiny_run.folder, tiny_run.data[:1], tmp_path / "e", split="test")


def write_csv(root: Path, images: tuple[Path, ...]) -> Path:
    """Two annotated images and one held out."""
    (root / "images").mkdir(parents=True)
    for name, image in zip(("a.jpg", "b.jpg", "c.jpg"), images, strict=False):
        shutil.copy(image, root / "images" / name)
    (root / "train.csv").write_text("a.jpg,1,2,60,50,leaf\nb.jpg,10,20,90,80,zebra\n", encoding="utf-8")
    (root / "val.csv").write_text("c.jpg,,,,,\n", encoding="utf-8")
    return root


def test_evaluation_json_tells_what_is_wrong(report: EvaluationReport, out: Path) -> None:
    written = json.loads((out / "e/evaluation.json").read_text())
    for one, values in zip(report.datasets, written["datasets"], strict=True):
        assert one.diagnosis is not None
        assert [error["kind"] for error in values["diagnosis"]["errors"]] == [
            "name", "place", "both", "duplicate", "background", "missed",
        ]  # fmt: skip
        assert [name.name for name in one.diagnosis.names] == list(NAMES[one.name])
        assert sum(name.objects for name in one.diagnosis.names) == one.joint.coco.objects
        assert sum(bin_.count for bin_ in one.diagnosis.calibration.bins) > 0
