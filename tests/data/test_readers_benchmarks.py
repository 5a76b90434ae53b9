"""KITTI, VisDrone, BDD100K, MOTChallenge, WIDER FACE and DOTA: the rules that each benchmark has published."""

from pathlib import Path
from typing import Any

import pytest
from reader_trees import save_image, write_json, write_text
from tool_trees import kitti, kitti_line, mot, visdrone, wider_face

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats.registry import recognise
from metr.data.formats.visdrone import NAMES


def opened(root: Path, tmp_path: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def records(source: DatasetSource) -> dict[str, Any]:
    """The images by folder and name."""
    return {"/".join(record.path.parts[-2:]): record for split in source.splits.values() for record in split}


def objects(source: DatasetSource, image: str) -> list[tuple[str, list[float], bool]]:
    """Name, box and whether it is ignored."""
    record = records(source)[image]
    rows = zip(record.labels, record.boxes.tolist(), record.ignore.tolist(), strict=True)
    return [(source.categories[label], [round(value, 3) for value in box], ignore) for label, box, ignore in rows]


def issues_of(source: DatasetSource) -> dict[str, int]:
    """What was noted, but for the note that regions are ignored."""
    return {kind: count for kind, count in source.issue_counts.items() if kind != "do-not-care regions"}


def test_kitti_regions_are_ignored_for_every_category(tmp_path: Path) -> None:
    kitti(tmp_path / "data")
    source = opened(tmp_path / "data", tmp_path)
    assert source.format == "kitti"
    assert source.categories == ("Car", "Person_sitting")
    assert issues_of(source) == {}
    assert objects(source, "image_2/000001.png") == [
        ("Person_sitting", [1, 2, 9, 8], False),
        ("Car", [20, 5, 30, 15], True),
        ("Person_sitting", [20, 5, 30, 15], True),
    ]
    assert objects(source, "image_2/000000.png") == [("Car", [2, 3, 12, 23], False)]
    assert len(records(source)) == 3  # none of testing, which nobody has labelled


@pytest.mark.parametrize(
    ("text", "boxes", "issues"),
    [
        (kitti_line("Car", (1, 2, 9, 8)).strip() + " 0.75\n", 1, {}),  # with a score
        ("", 0, {}),
        (
            kitti_line("Car", (1, 2, 9, 8)) + "Car 0.0 0 1 2\n",
            None,
            {"unreadable annotation": 1, "unannotated image": 1},
        ),
        (kitti_line("Car", (1, 2, 1, 8)), 0, {"degenerate box": 1}),
    ],
)
def test_kitti_lines(tmp_path: Path, text: str, boxes: int | None, issues: dict[str, int]) -> None:
    kitti(tmp_path / "data")
    write_text(tmp_path / "data" / "training" / "label_2" / "000002.txt", text)
    source = opened(tmp_path / "data", tmp_path)
    assert issues_of(source) == issues
    found = records(source).get("image_2/000002.png")
    assert (None if found is None else len(found.boxes)) == boxes


def test_kitti_images_without_labels_are_no_negatives(tmp_path: Path) -> None:
    kitti(tmp_path / "data")
    save_image(tmp_path / "data" / "training" / "image_2" / "000009.png")
    write_text(tmp_path / "data" / "training" / "label_2" / "000011.txt", kitti_line("Car", (1, 2, 9, 8)))
    source = opened(tmp_path / "data", tmp_path)
    assert issues_of(source) == {"unannotated image": 1, "missing image": 1}
    assert len(records(source)) == 3


def test_visdrone_ignores_regions_others_and_scores_of_zero(tmp_path: Path) -> None:
    visdrone(tmp_path / "data")
    source = opened(tmp_path / "data", tmp_path)
    assert source.format == "visdrone"
    assert source.categories == NAMES
    assert issues_of(source) == {}
    first, second = objects(source, "images/a.jpg"), objects(source, "images/b.jpg")
    assert first[:2] == [("car", [2, 3, 12, 23], False), ("pedestrian", [1, 1, 6, 6], False)]
    assert first[2:] == [(name, [20, 5, 30, 15], True) for name in NAMES]
    assert sorted(second) == sorted([*((name, [2, 3, 12, 23], True) for name in NAMES), ("motor", [1, 1, 6, 6], True)])


@pytest.mark.parametrize(
    ("line", "issues", "boxes"),
    [
        ("2,3,10,20,1,12,0,0", {"unknown category": 1}, 0),
        ("2,3,10,0,1,4,0,0", {"degenerate box": 1}, 0),
        ("2,3,10", {"unreadable annotation": 1, "unannotated image": 1}, None),
        ("2,3,10,20,1,x,0,0", {"unreadable annotation": 1, "unannotated image": 1}, None),
    ],
)
def test_visdrone_lines(tmp_path: Path, line: str, issues: dict[str, int], boxes: int | None) -> None:
    visdrone(tmp_path / "data")
    folder = tmp_path / "data" / "VisDrone2019-DET-train"
    save_image(folder / "images" / "c.jpg")
    write_text(folder / "annotations" / "c.txt", line + "\n")
    source = opened(tmp_path / "data", tmp_path)
    assert issues_of(source) == issues
    found = records(source).get("images/c.jpg")
    assert (None if found is None else len(found.boxes)) == boxes


def label(category: str, box: object = (2, 3, 12, 23), **rest: object) -> dict[str, Any]:
    corners = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)) if isinstance(box, tuple) else box
    return {"id": "0", "category": category, "attributes": {"occluded": False}, "box2d": corners} | rest


def bdd(tmp_path: Path, *entries: dict[str, Any], file: str = "labels/det_20/det_train.json") -> DatasetSource:
    root = tmp_path / "data"
    for entry in entries:
        save_image(root / "images" / "100k" / "train" / entry["name"])
    write_json(root / file, list(entries))
    return opened(root, tmp_path)


def test_bdd100k_of_2020(tmp_path: Path) -> None:
    crowd = label("pedestrian", attributes={"crowd": True})
    labels = [label("car"), label("other vehicle"), label("trailer"), label("other person"), crowd]
    source = bdd(tmp_path, {"name": "a.jpg", "labels": labels}, {"name": "b.jpg", "labels": []}, {"name": "c.jpg"})
    assert source.categories == ("car", "pedestrian", "truck")
    ignored = [(name, ignore) for name, _, ignore in objects(source, "train/a.jpg")]
    expected = [("car", False), ("car", True), ("truck", True), ("pedestrian", True), ("pedestrian", True)]
    assert ignored == expected
    assert source.issue_counts == {"unannotated image": 1}
    assert set(records(source)) == {"train/a.jpg", "train/b.jpg"}


def test_bdd100k_of_2018(tmp_path: Path) -> None:
    lane = label("lane", None, poly2d=[{"vertices": [[1, 2], [3, 4]], "types": "LL", "closed": False}])
    area = label("drivable area", None, poly2d=[])
    rider = label("rider", None, poly2d=[])
    labels = [label("motor"), lane, area, label("person"), rider]
    file = "labels/bdd100k_labels_images_train.json"
    source = bdd(
        tmp_path, {"name": "a.jpg", "labels": labels}, {"name": "b.jpg", "labels": [label("rider")]}, file=file
    )
    assert source.categories == ("motor", "person", "rider")
    assert source.issue_counts == {"unsupported shape": 1}


def test_bdd100k_boxes_that_cannot_be_read(tmp_path: Path) -> None:
    broken = label("car", {"x1": 2, "y1": None, "x2": 3, "y2": 4})
    entries = [
        {"name": "a.jpg", "labels": [label("car"), broken]},
        {"name": "b.jpg", "labels": [label("car", (1, 2, 1, 3))]},
    ]
    source = bdd(tmp_path, *entries, {"name": "c.jpg", "labels": 5})
    assert source.issue_counts == {"unreadable box": 1, "degenerate box": 1, "unreadable annotation": 1}
    assert set(records(source)) == {"train/a.jpg", "train/b.jpg"}
    assert records(source)["train/b.jpg"].annotated == ()


def test_mot_pixels_count_from_one_and_only_pedestrians_are_evaluated(tmp_path: Path) -> None:
    mot(tmp_path / "data")
    source = opened(tmp_path / "data", tmp_path)
    assert source.format == "mot"
    assert source.categories == ("pedestrian",)
    assert source.issue_counts == {}
    assert objects(source, "img1/000001.jpg") == [
        ("pedestrian", [2, 3, 12, 23], False),
        ("pedestrian", [0, 0, 5, 5], True),  # to be disregarded
        ("pedestrian", [19, 4, 29, 14], True),  # a static person
    ]
    assert objects(source, "img1/000002.jpg") == []
    assert objects(source, "img1/000003.jpg") == [("pedestrian", [30, 3, 40, 23], False)]  # goes on beyond the border


def test_mot17_has_each_sequence_three_times(tmp_path: Path) -> None:
    for detector in ("DPM", "FRCNN", "SDP"):
        mot(tmp_path / "data", f"MOT17-02-{detector}")
    source = opened(tmp_path / "data", tmp_path)
    assert sum(len(split) for split in source.splits.values()) == 3
    assert source.issue_counts == {"repeated sequence": 2}


def test_vehicles_without_a_motor_distract_in_mot20_alone(tmp_path: Path) -> None:
    for name, count in (("MOT16-02", 0), ("MOT20-01", 1)):
        folder = tmp_path / name / "train" / name
        save_image(folder / "img1" / "000001.jpg")
        save_image(folder / "img1" / "000002.jpg")
        write_text(folder / "gt" / "gt.txt", "1,1,3,4,10,20,0,6,1\n2,1,3,4,10,20,1,1,1\n")
        source = opened(tmp_path / name, tmp_path)
        assert [ignore for _, _, ignore in objects(source, "img1/000001.jpg")] == [True] * count


def sequence(tmp_path: Path, lines: str, names: str | None = None, info: str | None = None) -> DatasetSource:
    folder = tmp_path / "data" / "train" / "s-01"
    for frame in (1, 2, 3):
        save_image(folder / "img1" / f"{frame:08d}.jpg")
    write_text(folder / "gt" / "gt.txt", lines)
    if names is not None:
        write_text(folder / "gt" / "labels.txt", names)
    if info is not None:
        write_text(folder / "seqinfo.ini", info)
    return opened(tmp_path / "data", tmp_path)


def test_mot_of_2015_has_no_classes(tmp_path: Path) -> None:
    source = sequence(tmp_path, "1,1,3,4,10,20,1,-1,-1,-1\n1,2,3,4,10,20,0,7.5,8.5,0\n")
    assert [ignore for _, _, ignore in objects(source, "img1/00000001.jpg")] == [False, True]


def test_datasets_in_the_form_of_mot_name_their_classes(tmp_path: Path) -> None:
    source = sequence(tmp_path, "1,1,3,4,10,20,1,2,1\n1,2,3,4,10,20,1,1,1\n2,2,3,4,10,20,1,9,1\n", "car\nbus\n")
    assert [name for name, _, _ in objects(source, "img1/00000001.jpg")] == ["bus", "car"]
    assert source.issue_counts == {"unknown category": 1}


def test_mot_frames_that_are_missing_broken_or_beyond_the_end(tmp_path: Path) -> None:
    lines = "1,1,3,4,10,20,1,1,1\n2,1,3,4,oops\n7,1,3,4,10,20,1,1,1\nhello\n"
    source = sequence(tmp_path, lines, info="[Sequence]\nseqLength=2\nimWidth=40\nimHeight=30\n")
    assert source.issue_counts == {"unreadable annotation": 2, "missing image": 1, "unannotated image": 1}
    assert set(records(source)) == {"img1/00000001.jpg"}


def test_a_mot_sequence_does_not_lead_out_of_the_dataset(tmp_path: Path) -> None:
    save_image(tmp_path / "secret" / "000001.jpg")
    source = sequence(tmp_path, "1,1,3,4,10,20,1,1,1\n", info="[Sequence]\nimDir=../../../secret\n")
    assert source.issue_counts == {"unreadable annotation": 1}
    assert len(records(source)) == 3


def test_wider_face(tmp_path: Path) -> None:
    wider_face(tmp_path / "data")
    source = opened(tmp_path / "data", tmp_path)
    assert source.format == "wider_face"
    assert source.categories == ("face",)
    assert source.issue_counts == {}
    faces = [("face", [2, 3, 12, 23], False), ("face", [1, 1, 6, 6], True)]
    assert objects(source, "0--Parade/a.jpg") == faces
    assert objects(source, "0--Parade/b.jpg") == []
    assert objects(source, "1--Handshaking/a.jpg") == [("face", [4, 5, 10, 12], False)]


@pytest.mark.parametrize(
    ("text", "issues", "boxes"),
    [
        ("0\n", {}, 0),  # without the line of zeros
        ("1\n2 3 0 20 0 0 0 0 0 0\n", {"degenerate box": 1}, 0),
        ("2\n2 3 10 20 0 0 0 0 0 0\n", {"unreadable annotation": 1}, None),
        ("1\n2 3 10 20 0 0 0 0 0 0\n2 3 10 20 0 0 0 0 0 0\n", {"unreadable annotation": 1}, None),
        ("1\n2 3 x 20 0 0 0 0 0 0\n", {"unreadable annotation": 1}, None),
        ("0\n2 3 10 20 0 0 0 0 0 0\n", {"unreadable annotation": 1}, None),
        ("many\n", {"unreadable annotation": 1}, None),
        ("", {"unreadable annotation": 1}, None),
    ],
)
def test_wider_face_entries(tmp_path: Path, text: str, issues: dict[str, int], boxes: int | None) -> None:
    wider_face(tmp_path / "data")
    save_image(tmp_path / "data" / "WIDER_train" / "images" / "2--Ball" / "c.jpg")
    file = tmp_path / "data" / "wider_face_split" / "wider_face_train_bbx_gt.txt"
    write_text(file, file.read_text(encoding="utf-8") + "2--Ball/c.jpg\n" + text)
    source = opened(tmp_path / "data", tmp_path)
    assert source.issue_counts == issues
    found = records(source).get("2--Ball/c.jpg")
    assert (None if found is None else len(found.boxes)) == boxes
    assert len(records(source)) == 3 + (found is not None)


def dota(tmp_path: Path, text: str) -> DatasetSource:
    root = tmp_path / "data"
    for name in "ab":
        save_image(root / "train" / "images" / f"{name}.jpg")
        write_text(root / "train" / "labelTxt" / f"{name}.txt", text if name == "a" else "1 1 9 1 9 9 1 9 ship 0\n")
    return opened(root, tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2 10 7 3 12 10 7 23 plane 0", ("plane", [2, 3, 12, 23], False)),
        ("2.0 3.0 12.0 3.0 12.0 23.0 2.0 23.0 small-vehicle 1", ("small-vehicle", [2, 3, 12, 23], True)),
        ("2 3 12 3 12 23 2 23 plane 2", ("plane", [2, 3, 12, 23], True)),
        ("2 3 12 3 12 23 2 23 red cell 0", ("red cell", [2, 3, 12, 23], False)),
        ("2 3 12 3 12 23 2 23 plane", ("plane", [2, 3, 12, 23], False)),
        ("2 3 12 3 12 23 2 23 7 0", ("7", [2, 3, 12, 23], False)),
    ],
)
def test_dota_lines(tmp_path: Path, line: str, expected: object) -> None:
    source = dota(tmp_path, f"imagesource:GoogleEarth\ngsd:null\n{line}\n")
    assert source.format == "dota"
    assert objects(source, "images/a.jpg") == [expected]
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    ("text", "issues", "boxes"),
    [
        ("", {}, 0),
        ("imagesource:GoogleEarth\ngsd:0.1\n", {}, 0),
        ("1 2 3 4 plane 0\n", {"unreadable annotation": 1, "unannotated image": 1}, None),
        ("1 2 1 2 1 9 1 9 plane 0\n", {"degenerate box": 1}, 0),
        ("-5 3 12 3 12 23 -5 23 plane 0\n", {"box clipped": 1}, 1),
    ],
)
def test_odd_dota_files(tmp_path: Path, text: str, issues: dict[str, int], boxes: int | None) -> None:
    source = dota(tmp_path, text)
    assert source.issue_counts == issues
    found = records(source).get("images/a.jpg")
    assert (None if found is None else len(found.boxes)) == boxes


def test_dota_with_a_description_of_yolo(tmp_path: Path) -> None:
    """Roboflow's export for oriented boxes has a data.yaml, but no `labels`."""
    dota(tmp_path, "1 2 9 2 9 8 1 8 ship 0\n")
    write_text(tmp_path / "data" / "data.yaml", "train: ../train/images\nval: ../train/images\nnames: [ship]\n")
    assert recognise(tmp_path / "data").format == "dota"


@pytest.mark.parametrize(
    "line",
    [
        "0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9 0.5 0.5",
        "1 0 0 1 0 1 1 0 1 1 0",
        "4 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9 6.5e-05 -0.0001 0.1 0.2",
        "0 " + " ".join(["0.123456789"] * 1000),
        "0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9",
        "0 0.5 0.5 0.2 0.2 0.1 0.1 2 0.2 0.2 2",  # key points
    ],
)
def test_yolo_polygons_are_not_dota(tmp_path: Path, line: str) -> None:
    root = tmp_path / "data"
    save_image(root / "train" / "images" / "a.jpg")
    write_text(root / "train" / "labels" / "a.txt", line + "\n")
    write_text(root / "data.yaml", "train: train/images\nnames: [ship, boat]\n")
    assert recognise(root).format == "yolo"


def test_dota_files_that_were_converted_to_yolo_are_yolo(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_text(root / "labels" / "train_original" / "a.txt", "1 2 9 2 9 8 1 8 ship 0\n")
    save_image(root / "images" / "train" / "a.jpg")
    write_text(root / "labels" / "train" / "a.txt", "0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\n")
    write_text(root / "data.yaml", "train: images/train\nnames: [ship]\n")
    assert recognise(root).format == "yolo"
