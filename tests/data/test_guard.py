"""The guard: a split without a box, or of which most was lost, is neither trained nor evaluated on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.config import SubsetConfig
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.guard import check_usable, faults_of, log_issues
from metr.data.joint import subset_of
from metr.errors import DataError

SOUND, LOST = "0 0.5 0.5 0.2 0.2", "7 0.5 0.5 0.2 0.2"


def yolo(root: Path, **texts: Sequence[str]) -> DatasetSource:
    """A dataset whose splits have an image for each text file."""
    for split, files in texts.items():
        for number, text in enumerate(files):
            save_image(root / "data" / "images" / split / f"{number}.jpg")
            write_text(root / "data" / "labels" / split / f"{number}.txt", text)
    splits = "".join(f"{split}: images/{split}\n" for split in texts)
    write_text(root / "data" / "data.yaml", f"names: [cat]\n{splits}")
    return opened(root)


def opened(root: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root / "data"), root / "cache")


def test_issues_are_told_of_a_dataset_that_is_used_and_of_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    yolo(tmp_path / "lost", train=[LOST, LOST], val=[SOUND])
    yolo(tmp_path / "good", train=[SOUND, LOST], val=[SOUND])
    assert "issues in its files" not in caplog.text, "whether they matter is not known yet"
    log_issues([opened(tmp_path / "good")])
    told = "made: issues in its files: 1 x unknown category; `metr inspect"
    assert caplog.text.count(told) == 1
    caplog.clear()
    for verb in (train, evaluate):
        with pytest.raises(DataError, match=r"split of 'made' is not used: .*unknown category"):
            verb(tmp_path)
    assert "issues in its files" not in caplog.text, "the error says it all"


def test_datasets_that_read_the_same_files_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = yolo(tmp_path, train=[SOUND], val=[SOUND])
    (tmp_path / "link").symlink_to(tmp_path / "data")

    def named(name: str, path: Path, **options: Any) -> DatasetSource:
        return open_dataset(DatasetConfig(name=name, path=path, **options), tmp_path / "cache")

    log_issues([first, named("half", tmp_path / "data", splits={"train": "val", "val": "train"})])
    assert "the same files" not in caplog.text
    log_issues([first, named("again", tmp_path / "link")])
    assert caplog.text.count("made and again read the same files") == 1


def train(place: Path) -> None:
    from metr.training.train import train as run

    run(f"made={place / 'lost/data'}", place / "run")


def evaluate(place: Path) -> None:
    from metr.evaluation.runner import evaluate as run

    run(place / "no checkpoint", f"made={place / 'lost/data'}", split="train")


def kinds(source: DatasetSource, split: str) -> list[str]:
    return [fault.kind for fault in faults_of(source, split)]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["", ""], ["split without a box"]),
        ([SOUND, "", "", ""], []),
        ([SOUND, LOST], []),
        ([SOUND, LOST, LOST], ["most boxes lost"]),
        ([LOST], ["most boxes lost"]),
        ([f"{SOUND}\n0 9 9 0.1 0.1\n0 0.5 0.5 0 0"], ["most boxes lost"]),
    ],
)
def test_splits_are_judged_by_their_boxes(tmp_path: Path, texts: list[str], expected: list[str]) -> None:
    source = yolo(tmp_path, train=texts, val=[SOUND])
    assert kinds(source, "train") == expected
    assert kinds(source, "val") == []
    check_usable(source, "val")
    if not expected:
        check_usable(source, "train")
        return
    with pytest.raises(DataError, match="the train split of 'made' is not used") as caught:
        check_usable(source, "train")
    assert "--allow-empty" in str(caught.value.hint)


def test_the_message_says_how_many_were_lost_and_why(tmp_path: Path) -> None:
    source = yolo(tmp_path, train=[SOUND, f"{LOST}\n{LOST}\n{LOST}\n0 2 2 0.1 0.1"], val=[SOUND])
    with pytest.raises(DataError) as caught:
        check_usable(source, "train")
    told = "4 of 5 boxes were lost while reading (3 x unknown category, 1 x box outside); such as labels/train/1.txt:1:"
    assert told in caught.value.what
    assert "class 7 has no name" in caught.value.what
    assert caught.value.where == tmp_path / "data"


def test_images_that_are_lost(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "train" / "a.jpg")
    images = [
        {"id": number, "file_name": f"{name}.jpg", "width": 40, "height": 30} for number, name in enumerate("abc")
    ]
    boxes = [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    write_json(tmp_path / "data" / "annotations" / "instances_train.json", content)
    source = opened(tmp_path)
    assert kinds(source, "train") == ["most images lost"]
    with pytest.raises(DataError, match=r"2 of 3 images were lost while reading \(2 x missing image\)"):
        check_usable(source, "train")


def test_unreadable_annotations_are_images_or_boxes_by_the_format(tmp_path: Path) -> None:
    box = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    for name in "abc":
        save_image(tmp_path / "data" / "train" / f"{name}.jpg")
        sound = f"<annotation>{box * 20}</annotation>"
        write_text(tmp_path / "data" / "train" / f"{name}.xml", sound if name == "a" else "<annotation>")
    assert kinds(opened(tmp_path), "train") == ["most images lost"]
    lines = ["a.jpg,1,1,9,9,cat", "b.jpg,1,1,9,9,cat", *[",1,1,9,9,cat"] * 3]
    write_text(tmp_path / "csv" / "data" / "train.csv", "\n".join(lines))
    for name in "ab":
        save_image(tmp_path / "csv" / "data" / "images" / f"{name}.jpg")
    assert kinds(opened(tmp_path / "csv"), "train") == ["most boxes lost"]


def test_a_held_out_val_is_judged_with_train(tmp_path: Path) -> None:
    source = yolo(tmp_path, train=["", "", "", "", SOUND])
    assert source.held_out
    assert kinds(source, "train") == kinds(source, "val") == []
    check_usable(source, "val")
    lossy = yolo(tmp_path / "more", train=[SOUND, LOST, LOST, LOST])
    with pytest.raises(DataError, match="3 of 4 boxes"):
        check_usable(lossy, "val")


def test_an_own_val_that_came_to_nothing_is_not_replaced_in_silence(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / "data" / "images" / f"{name}.jpg")
    write_text(tmp_path / "data" / "train.csv", "".join(f"{name}.jpg,1,1,9,9,cat\n" for name in "abc"))
    write_text(tmp_path / "data" / "val.csv", "gone.jpg,1,1,9,9,cat\n")
    source = opened(tmp_path)
    assert source.held_out
    assert kinds(source, "train") == []
    with pytest.raises(DataError, match=r"the val split of 'made' is not used: 1 of 1 images .*1 x missing image"):
        check_usable(source, "val")


def test_a_train_split_that_came_to_nothing_says_why(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "images" / "a.jpg")
    write_text(tmp_path / "data" / "train.csv", "gone.jpg,1,1,9,9,cat\n")
    write_text(tmp_path / "data" / "val.csv", "a.jpg,1,1,9,9,cat\n")
    source = opened(tmp_path)
    assert kinds(source, "train") == ["most images lost"]
    with pytest.raises(DataError, match=r"no 'train' split: no image is left in it \(1 x missing image\)"):
        source.split("train")


def test_the_advice_for_a_split_without_a_box_is_that_of_its_files(tmp_path: Path) -> None:
    """Text files are asked for where a YOLO dataset has none; not where they are empty, and of no other format."""
    missing, empty, coco = tmp_path / "missing", tmp_path / "empty", tmp_path / "coco"
    for root in (missing, empty):
        yolo(root, train=["", ""], val=[SOUND])
    for file in (missing / "data" / "labels" / "train").iterdir():
        file.unlink()
    for split, boxes in (("train", []), ("val", [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}])):
        save_image(coco / "data" / split / "a.jpg")
        images, categories = [{"id": 1, "file_name": "a.jpg"}], [{"id": 1, "name": "cat"}]
        tree = {"images": images, "categories": categories, "annotations": boxes}
        write_json(coco / "data" / split / "_annotations.coco.json", tree)
    for root, advice in (
        (missing, "put the text files"),
        (empty, "annotate some of its images"),
        (coco, "annotate some of its images"),
    ):
        with pytest.raises(DataError, match="the train split of 'made' is not used: no box in") as caught:
            check_usable(opened(root), "train")
        assert f"shows all; {advice}" in str(caught.value)


def test_chosen_images_without_a_box(tmp_path: Path) -> None:
    source = yolo(tmp_path, train=["", "", "", "", SOUND], val=[SOUND])
    parts = [subset_of(source.split("train"), SubsetConfig(fraction=0.2, seed=seed)) for seed in range(10)]
    empty = next(part for part in parts if not len(part[0].boxes))
    check_usable(source, "train", next(part for part in parts if len(part[0].boxes)))
    with pytest.raises(DataError, match="no box in the 1 image chosen"):
        check_usable(source, "train", empty)


def test_what_to_do_about_a_split_that_nobody_annotated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no box in 1 image\n.*; annotate some of its images; --allow-empty"):
        check_usable(yolo(tmp_path / "yolo", train=[SOUND], val=[""]), "val")
    root = tmp_path / "csv" / "data"
    for number in range(3):
        save_image(root / f"{number}.jpg")
    for split, rows in (("train", "0.jpg,1,1,9,9,cat\n1.jpg,1,1,9,9,cat"), ("val", "2.jpg,,,,,")):
        write_text(root / f"{split}.csv", f"image,xmin,ymin,xmax,ymax,label\n{rows}\n")
    with pytest.raises(DataError, match="annotate some of its images"):
        check_usable(opened(tmp_path / "csv"), "val")
