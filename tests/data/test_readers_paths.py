"""Images that annotation files name by paths of other machines, by addresses, or by paths that lead elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError

NOTE = "image found by its name"


def opened(root: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root), root.parent / "cache")


def coco(root: Path, names: Sequence[str], images: Sequence[str], file: str = "result.json") -> DatasetSource:
    """Entries with these names, each with a box at its number, and the images."""
    for image in images:
        save_image(root / image)
    write_json(root / file, content(names))
    return opened(root)


def content(names: Sequence[str]) -> dict[str, Any]:
    listed = [{"id": number, "file_name": name, "width": 40, "height": 30} for number, name in enumerate(names)]
    boxes = [
        {"id": number, "image_id": number, "category_id": 1, "bbox": [number, 2, 9, 9]} for number in range(len(names))
    ]
    return {"images": listed, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}


def found(source: DatasetSource) -> dict[str, list[float]]:
    """The left sides of the boxes of each image."""
    return {
        record.path.relative_to(source.root).as_posix(): record.boxes[:, 0].tolist()
        for annotations in source.splits.values()
        for record in annotations
    }


FOREIGN = [
    "..\\..\\label-studio\\media\\upload\\4\\{}",
    "../../media/upload/4/{}",
    "images\\1/{}",
    "images/1/{}",
    "/data/local-files/?d=shots/{}",
    "/data/local-files/?d=shots%2F{}",
    "http://localhost:8080/data/upload/1/{}",
    "https://example.org/{}?X-Amz-Signature=ab/cd.png",
    "s3://bucket/deep/{}",
    "http://[broken/{}",
    "/content/drive/MyDrive/proj/images/{}",
    "C:\\Users\\me\\proj\\images\\{}",
    "C:/Users/me/{}",
    "file:///home/me/{}",
    "//server/share/{}",
]


@pytest.mark.parametrize("pattern", FOREIGN)
def test_paths_of_elsewhere_lead_to_the_image_of_that_name(tmp_path: Path, pattern: str) -> None:
    names = ["shot 0.png", "shot_1.png", "снимок.png"]
    source = coco(tmp_path / "data", [pattern.format(name) for name in names], [f"images/{name}" for name in names])
    assert found(source) == {f"images/{name}": [number] for number, name in enumerate(names)}
    assert source.issue_counts == {NOTE: 1}
    assert "images/shot 0.png" in source.issues[0].detail


@pytest.mark.parametrize("pattern", FOREIGN)
def test_a_csv_file_of_another_machine(tmp_path: Path, pattern: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        save_image(tmp_path / "data" / "images" / name)
    lines = [f"{pattern.format(name)},{number},2,20,20,cat" for number, name in enumerate(("a.jpg", "b.jpg"))]
    write_text(tmp_path / "data" / "labels.csv", "\n".join(lines))
    source = opened(tmp_path / "data")
    assert found(source) == {"images/a.jpg": [0], "images/b.jpg": [1]}
    assert source.issue_counts == {NOTE: 1}


def test_imagefolder_of_another_machine(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        save_image(tmp_path / "data" / "train" / name)
    rows = [
        {"file_name": f"D:\\set\\{name}", "objects": {"bbox": [[number, 2, 9, 9]], "categories": ["cat"]}}
        for number, name in enumerate(("a.jpg", "b.jpg"))
    ]
    write_text(tmp_path / "data" / "train" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert found(opened(tmp_path / "data")) == {"train/a.jpg": [0], "train/b.jpg": [1]}


def test_the_longest_end_decides(tmp_path: Path) -> None:
    names = ["/home/me/one/a.jpg", "/home/me/two/a.jpg"]
    source = coco(tmp_path / "data", names, ["pool/one/a.jpg", "pool/two/a.jpg", "images/b.jpg"])
    assert found(source) == {"pool/one/a.jpg": [0], "pool/two/a.jpg": [1]}


def test_an_end_that_several_images_share_is_an_issue(tmp_path: Path) -> None:
    names = ["/home/me/a.jpg", "/home/me/b.jpg"]
    source = coco(tmp_path / "data", names, ["one/a.jpg", "two/a.jpg", "one/b.jpg"])
    assert found(source) == {"one/b.jpg": [1]}
    assert source.issue_counts == {NOTE: 1, "ambiguous image": 1}
    issue = next(issue for issue in source.issues if issue.kind == "ambiguous image")
    assert "one/a.jpg or two/a.jpg" in issue.detail


@pytest.mark.parametrize("order", [1, -1])
def test_two_paths_of_which_neither_is_the_image_go_to_none(tmp_path: Path, order: int) -> None:
    names = ["/m/one/a.jpg", "/m/two/a.jpg", "b.jpg"][::order]
    source = coco(tmp_path / "data", names, ["images/a.jpg", "images/b.jpg"])
    assert list(found(source)) == ["images/b.jpg"]
    assert source.issue_counts == {NOTE: 1, "missing image": 2}


@pytest.mark.parametrize("order", [1, -1])
def test_a_path_of_elsewhere_gives_way_to_the_true_path(tmp_path: Path, order: int) -> None:
    names = ["/m/two/a.jpg", "a.jpg"][::order]
    source = coco(tmp_path / "data", names, ["images/a.jpg"])
    assert found(source) == {"images/a.jpg": [names.index("a.jpg")]}
    assert source.issue_counts == {NOTE: 1, "missing image": 1}


def test_the_same_path_twice_is_one_image(tmp_path: Path) -> None:
    source = coco(tmp_path / "data", ["/m/two/a.jpg", "/m/two/a.jpg"], ["images/a.jpg"])
    assert found(source) == {"images/a.jpg": [0, 1]}
    assert source.issue_counts == {NOTE: 1, "duplicate image": 1}


def test_a_missing_folder_is_not_made_up_for_by_another(tmp_path: Path) -> None:
    """The path is one below the dataset's folder, and there is no reason to think of another folder."""
    source = coco(tmp_path / "data", ["one/a.jpg", "two/b.jpg"], ["two/a.jpg", "two/b.jpg"])
    assert found(source) == {"two/b.jpg": [1]}
    assert source.issue_counts == {"missing image": 1}


@pytest.mark.parametrize("name", ["/m/a.jpg", "a.jpg", "train/a.jpg", "http://host/a.jpg"])
def test_images_of_another_split_are_no_substitute(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    write_json(root / "annotations" / "instances_val.json", content(["v.jpg"]))
    source = coco(root, [name, "t.jpg"], ["train/t.jpg", "val/v.jpg", "val/a.jpg"], "annotations/instances_train.json")
    assert found(source) == {"train/t.jpg": [1], "val/v.jpg": [0]}


def test_two_splits_do_not_share_an_image(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_json(root / "annotations" / "instances_val.json", content(["/m/two/a.jpg", "/m/two/b.jpg"]))
    source = coco(root, ["/m/one/a.jpg"], ["images/a.jpg", "images/b.jpg"], "annotations/instances_train.json")
    assert found(source) == {"images/a.jpg": [0], "images/b.jpg": [1]}
    assert source.issue_counts == {NOTE: 1, "ambiguous image": 1}


@pytest.mark.parametrize("folder", ["masks", "SegmentationClass", "thumbs", "depth_maps"])
def test_masks_are_no_substitute(tmp_path: Path, folder: str) -> None:
    source = coco(tmp_path / "data", ["/m/a.png", "/m/b.png"], [f"{folder}/a.png", "shots/b.png"])
    assert found(source) == {"shots/b.png": [1]}


def test_a_name_alone_is_found_in_any_folder(tmp_path: Path) -> None:
    source = coco(tmp_path / "data", ["a.jpg", "x/b.jpg"], ["photos/batch 1/a.jpg", "photos/x/b.jpg"])
    assert found(source) == {"photos/batch 1/a.jpg": [0], "photos/x/b.jpg": [1]}
    assert source.issue_counts == {NOTE: 1}


def test_nothing_outside_of_the_folder_is_taken(tmp_path: Path) -> None:
    save_image(tmp_path / "secret.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "file:///etc/../secret.jpg"]
    with pytest.raises(DataError, match="path outside"):
        coco(tmp_path / "data", names, ["images/a.jpg"])


def test_a_new_image_of_the_same_name_is_noticed(tmp_path: Path) -> None:
    source = coco(tmp_path / "data", ["/m/a.jpg", "/m/b.jpg"], ["one/a.jpg", "one/b.jpg"])
    assert found(source) == {"one/a.jpg": [0], "one/b.jpg": [1]}
    save_image(tmp_path / "data" / "two" / "a.jpg")
    assert found(opened(tmp_path / "data")) == {"one/b.jpg": [1]}


def test_a_hidden_image_is_taken_where_it_is_named(tmp_path: Path) -> None:
    source = coco(tmp_path / "data", [".a.jpg", "in/.b.jpg"], [".a.jpg", "in/.b.jpg", ".c.jpg"])
    assert source.issues == ()
    assert found(source) == {".a.jpg": [0], "in/.b.jpg": [1]}
