"""Images that a checkpoint is known to have been trained on: AP there says nothing of new images, and it is told."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.evaluation.report import as_markdown
from metr.evaluation.results import store_calibration
from metr.evaluation.runner import evaluate
from metr.evaluation.seen import seen_in_training
from metr.text.vocabulary import Vocabulary

from tiny import NAMES, TinyRun

VOCABULARY = Vocabulary.union(NAMES)
# train 4 images and val 3: together 7, of which a fifth is held out, and val once more as test
HELD_OUT = {"train": ["train", "val"], "test": "val"}
OWN = {"train": "train", "val": "val"}


def listing(run: TinyRun, place: Path, splits: dict[str, Any] | None, **more: Any) -> str:
    """The pond with other splits, as an argument of a command."""
    entry = {"name": "pond", "path": str(run.datasets[0]), **({} if splits is None else {"splits": splits}), **more}
    path = place / "pond.yaml"
    path.write_text(json.dumps({"datasets": [entry]}))
    return str(path)


def source(run: TinyRun, place: Path, splits: dict[str, Any] | None, **more: Any) -> DatasetSource:
    (spec,) = parse_data_arguments([listing(run, place, splits, **more)])
    return open_dataset(spec)


def facts(train: int, val: int, trained_on: int | None = None, **more: Any) -> dict[str, Any]:
    trained_on = train if trained_on is None else trained_on
    return {"data": {"pond": {"splits": {"train": train, "val": val}, "trained_on": trained_on, "names": 4, **more}}}


@pytest.mark.parametrize(
    ("training", "splits", "split", "told"),
    [
        # the seeded fifth was no val when training took all images
        (facts(7, 3), HELD_OUT, "val", "was trained on 7 images of pond, this image of val among them"),
        (facts(7, 3, held_out=False), HELD_OUT, "val", "was trained on 7 images of pond, this image of val among them"),
        (facts(7, 3, 3), HELD_OUT, "val", "was trained on 3 of 7 images of pond, perhaps this image of val among them"),
        # earlier training counts too
        (
            {"finetuned_from": {"finetuned_from": facts(7, 3)}, "data": {}},
            HELD_OUT,
            "val",
            "was trained on 7 images of",
        ),
        # the dataset has grown since then, or lost images: most of val was trained on all the same
        (facts(9, 3), HELD_OUT, "val", "was trained on 9 images of pond, perhaps this image of val among them"),
        # val was made part of train
        (facts(7, 3), OWN, "val", "was trained on 7 images of pond, these 3 images of val among them"),
        # so was test
        (facts(7, 3), {"train": "train", "test": "val"}, "test", "these 3 images of test among them"),
        # what is trained on itself
        (facts(4, 3), OWN, "train", "was trained on 4 images of pond, these 4 images of train among them"),
        (facts(4, 3), None, "all", "was trained on 4 images of pond, which are among these 7"),
    ],
)
def test_what_the_numbers_of_training_tell(
    tiny_run: TinyRun, tmp_path: Path, training: dict[str, Any], splits: dict[str, Any] | None, split: str, told: str
) -> None:
    (spec,) = parse_data_arguments([listing(tiny_run, tmp_path, splits)])
    seen = seen_in_training(training, open_dataset(spec, together=split == "all"), split, VOCABULARY)
    assert seen is not None
    assert seen.fact.startswith("the checkpoint was trained on ")
    assert told in seen.fact


@pytest.mark.parametrize(
    ("training", "splits", "split"),
    [
        (facts(4, 3), OWN, "val"),
        # the same fifth was held out then
        (facts(6, 1), HELD_OUT, "val"),
        (facts(6, 1, held_out=True), HELD_OUT, "val"),
        # and the dataset has lost images since then
        (facts(8, 2), HELD_OUT, "val"),
        (facts(9, 4, held_out=True), HELD_OUT, "val"),
        (facts(7, 3), HELD_OUT, "test"),
        # nothing is recorded, or what is makes no sense
        ({}, HELD_OUT, "val"),
        ({"data": {"desk": facts(7, 3)["data"]["pond"]}}, HELD_OUT, "val"),
        ({"data": {"pond": {"splits": {"train": "many"}, "trained_on": None}}}, HELD_OUT, "val"),
        ({"data": [1], "finetuned_from": 3}, HELD_OUT, "val"),
    ],
)
def test_where_nothing_is_known_nothing_is_told(
    tiny_run: TinyRun, tmp_path: Path, training: dict[str, Any], splits: dict[str, Any], split: str
) -> None:
    assert seen_in_training(training, source(tiny_run, tmp_path, splits), split, VOCABULARY) is None


def test_a_dataset_of_the_same_name_is_another_one_where_its_names_are(tiny_run: TinyRun, tmp_path: Path) -> None:
    other = source(tiny_run, tmp_path, HELD_OUT, renames={"fish": "trout"})
    assert seen_in_training(facts(7, 3), other, "val", VOCABULARY) is None
    some = source(tiny_run, tmp_path, HELD_OUT, only=["fish", "frog"])
    assert seen_in_training(facts(7, 3), some, "val", VOCABULARY) is not None


def test_a_dataset_that_is_called_otherwise_now_is_known_by_its_categories_and_numbers(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    def moved(splits: dict[str, Any], **more: Any) -> DatasetSource:
        return replace(source(tiny_run, tmp_path, splits, **more), name="data")

    seen = seen_in_training(facts(7, 3), moved(OWN), "val", VOCABULARY)
    assert seen is not None
    assert seen.dataset == "data"
    assert seen.fact == "the checkpoint was trained on 7 images of pond, these 3 images of val among them"
    # other numbers, some of its categories or others: that may be anything
    assert seen_in_training(facts(9, 3), moved(HELD_OUT), "val", VOCABULARY) is None
    assert seen_in_training(facts(7, 3), moved(OWN, only=["fish", "frog"]), "val", VOCABULARY) is None
    assert seen_in_training(facts(7, 3), moved(OWN, renames={"fish": "trout"}), "val", VOCABULARY) is None
    assert seen_in_training({}, moved(OWN), "val", VOCABULARY) is None


@pytest.fixture
def trained_on_all(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A checkpoint whose training took all seven images of the pond, as older ones have recorded it."""
    folder = tmp_path / "all"
    shutil.copytree(tiny_run.best, folder)
    config = json.loads((folder / "config.json").read_text())
    config["training"]["data"]["pond"] = facts(7, 3)["data"]["pond"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_evaluation_on_images_of_training_says_so(
    trained_on_all: Path, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [listing(tiny_run, tmp_path, HELD_OUT), tiny_run.data[1]]
    caplog.set_level(logging.INFO)
    report = evaluate(trained_on_all, data, tmp_path / "e")
    (warning,) = [one.getMessage() for one in caplog.records if "was trained on" in one.getMessage()]
    assert warning.startswith("pond: the checkpoint was trained on 7 images of pond, this image of val among them: ")
    assert "not how well it finds what is in new images" in warning
    assert warning.endswith("What to try: --split test (3 images)")
    assert "training has seen none" not in caplog.text, "it has"
    pond, desk = report.datasets
    assert ("was trained on 7 images of pond" in pond.seen, desk.seen) == (True, "")
    assert "**pond**: the checkpoint was trained on 7 images" in as_markdown(report)
    assert json.loads((tmp_path / "e/evaluation.json").read_text())["datasets"][0]["seen"] == pond.seen
    caplog.clear()
    assert [one.seen for one in evaluate(trained_on_all, data[:1], split="test").datasets] == [""]
    assert "was trained on" not in caplog.text


def test_scores_that_are_fitted_to_images_of_training_are_told(
    trained_on_all: Path, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = evaluate(trained_on_all, [listing(tiny_run, tmp_path, HELD_OUT), *tiny_run.data[1:]])
    fitted = replace(report.datasets[0], calibration={"fish": (1.0, 0.0)}, threshold=0.3)
    caplog.clear()
    store_calibration(replace(report, datasets=(fitted,)), trained_on_all)
    assert "pond: scores are fitted to images that training has seen" in caplog.text
    caplog.clear()
    store_calibration(replace(report, datasets=(replace(fitted, seen=""),)), trained_on_all)
    assert "training has seen" not in caplog.text
