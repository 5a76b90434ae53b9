"""`only`, `drop` and `ignore` of a datasets file: which names are read, and what is known of the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reader_trees import save_image, write_text

from metr.data.config import AugmentationConfig, SubsetConfig
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.data.joint import open_joint
from metr.data.sampling import SampleKey
from metr.errors import ConfigError, DataError
from metr.evaluation.coco import evaluate_detections
from metr.structures import Detections

LINES = ["a.jpg,cat,1,2,9,9", "a.jpg,dog,20,2,30,9", "a.jpg,cow,1,12,9,19", "b.jpg,dog,20,2,30,9", "b.jpg,cat,1,2,9,9"]


def root_of(tmp_path: Path, name: str = "data", split: str = "train") -> Path:
    for image in "ab":
        save_image(tmp_path / name / f"{image}.jpg")
    write_text(tmp_path / name / f"{split}.csv", "\n".join(["filename,class,x1,y1,x2,y2", *LINES]))
    return tmp_path / name


def opened(root: Path, **options: Any) -> DatasetSource:
    options = {"splits": {"train": "train"}} | options
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / "cache")


@pytest.mark.parametrize("options", [{"only": ("cat", "cow")}, {"drop": ("dog",)}])
def test_names_that_are_not_read(tmp_path: Path, options: dict[str, Any]) -> None:
    source = opened(root_of(tmp_path), **options)
    assert source.categories == ("cat", "cow")
    train = source.split("train")
    assert [record.labels.tolist() for record in train] == [[0, 1], [0]]
    np.testing.assert_array_equal(train[0].boxes, [[1, 2, 9, 9], [1, 12, 9, 19]])
    assert all(len(record.areas) == len(record.ignore) == len(record.labels) for record in train)
    assert train[0].annotated is None
    counts = train.counts()
    assert (counts.boxes.tolist(), counts.ignored.tolist(), counts.empty) == ([2, 1], [0, 0], 0)
    assert [part.tolist() for part in next(iter(train.objects()))] == [[0, 0, 1], [0, 1, 0]]
    assert train.unknown_names == ("dog",)
    assert source.issue_counts == {}


def test_boxes_of_ignored_names_are_regions(tmp_path: Path) -> None:
    source = opened(root_of(tmp_path), ignore=("dog",))
    record = source.split("train")[0]
    assert source.categories == ("cat", "cow")
    assert (record.labels.tolist(), record.ignore.tolist()) == ([0, 1, 0, 1], [False, False, True, True])
    np.testing.assert_array_equal(record.boxes[2:], [[20, 2, 30, 9]] * 2)
    counts = source.split("train").counts()
    assert (counts.ignored.tolist(), counts.ignored_boxes) == ([2, 2], 2)


def test_names_are_meant_after_renames(tmp_path: Path) -> None:
    source = opened(root_of(tmp_path), renames={"dog": "pet", "cat": "pet"}, drop=("pet",))
    assert source.categories == ("cow",)
    assert [record.labels.tolist() for record in source.split("train")] == [[0], []]
    with pytest.raises(DataError, match=r"`drop` names 'dog', which `renames` of this dataset has renamed to 'pet'"):
        opened(root_of(tmp_path), renames={"dog": "pet"}, drop=("dog",))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"only": ("cta",)}, "`only` names 'cta', which is no category of this dataset"),
        ({"ignore": ("cta",)}, "`ignore` names 'cta', which is no category of this dataset"),
        ({"drop": ("cat", "dog", "cow")}, "no category is read: none is left by `drop`"),
        ({"only": (), "ignore": ("cat",)}, "no category is read: `only` is empty"),
        ({"drop": ("dog",), "prompts": {"dog": "a dog"}}, "`prompts` names 'dog', which is not read here"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as error:
        opened(root_of(tmp_path), **options)
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("only: [cat]\n    drop: [dog]", "`only` or `drop`, found both"),
        ("drop: [dog]\n    ignore: [dog]", "'dog' is in `drop` and in `ignore`"),
        ("only: [no]\n    ignore: [no]", "'no' is in `only` and in `ignore`"),
    ],
)
def test_keys_that_exclude_each_other(tmp_path: Path, lines: str, what: str) -> None:
    file = write_text(tmp_path / "data.yaml", f"datasets:\n  - path: {root_of(tmp_path)}\n    {lines}\n")
    with pytest.raises(ConfigError) as error:
        parse_data_arguments([str(file)])
    assert what in str(error.value)


@pytest.mark.parametrize("shots", [None, 1])
@pytest.mark.parametrize("option", ["drop", "ignore"])
def test_a_name_that_is_not_read_is_no_negative(tmp_path: Path, option: str, shots: int | None) -> None:
    """Another dataset annotates it, and `unannotated: negative` takes names of others for absent: not this one."""
    one, other = root_of(tmp_path, "one"), root_of(tmp_path, "other")
    text = f"datasets:\n  - {{path: {one}, {option}: [dog], splits: {{train: train, val: train}}}}\n"
    text += f"  - {{path: {other}, renames: {{cow: bird}}, splits: {{train: train, val: train}}}}\n"
    joint = open_joint([str(write_text(tmp_path / "data.yaml", text))], SubsetConfig(shots=shots) if shots else None)
    assert joint.vocabulary.names == ("cat", "cow", "bird", "dog")
    first, second = joint.training(AugmentationConfig(), "negative")
    assert first.assumed_negative.tolist() == [False, False, True, False]
    assert second.assumed_negative.tolist() == [False, True, False, False]
    targets = first.sample(SampleKey(number=0, dataset=0, index=0, seed=1)).targets
    assert not targets.absent[0, 3]
    assert not targets.annotated[0, 3]
    assert set(targets.ignore_labels[0].tolist()) <= {0, 1}


def test_what_is_found_at_an_ignored_box_counts_neither_way(tmp_path: Path) -> None:
    """A detection on the box of an ignored name is no mistake; on the box of a dropped name it is one."""
    root = root_of(tmp_path, split="val")

    def precision(**options: Any) -> float:
        source = opened(root, splits={"val": "val"}, **options)
        names = source.categories
        boxes = torch.tensor([[20.0, 2, 30, 9], [1, 2, 9, 9]])
        detections = Detections(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([0, 0]), names=names)
        split = source.split("val")
        found = {record.image_id: detections for record in split}
        report = evaluate_detections(split, found)
        (cat,) = (one for one in report.categories if one.name == "cat")
        assert cat.ap is not None
        return cat.ap

    assert precision(ignore=("dog",)) == pytest.approx(100)
    assert precision(drop=("dog",)) == pytest.approx(50, abs=1)
