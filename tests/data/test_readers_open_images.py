"""Open Images CSV: boxes count for their class and its superclasses; verified labels decide what is annotated."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import csv_header, made_up, save_image, write_text
from test_readers_damaged import damaged

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats import open_images_tables
from metr.data.formats.registry import recognise
from metr.data.records import ImageRecord
from metr.errors import DataError, MetrError

# Identifier -> name, and the classes right above each. The root of the hierarchy is no class.
NAMES = {
    "/m/01g317": "Person",
    "/m/04yx4": "Man",
    "/m/07yv9": "Vehicle",
    "/m/0k4j": "Car",
    "/m/01lcw4": "Limousine",
    "/m/0199g": "Bicycle, bike",
    "/g/11_x": "Boot",
}
ABOVE = {"/m/04yx4": ["/m/01g317"], "/m/0k4j": ["/m/07yv9"], "/m/01lcw4": ["/m/0k4j"], "/m/0199g": ["/m/07yv9"]}
IDS = tuple(NAMES)
SPLITS = ("train", "validation", "test")
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CLICKS = HEADER + ",XClick1X,XClick2X"

Row = tuple[str, str, tuple[float, float, float, float], int]  # image, class, xyxy, group-of


def tree() -> dict[str, Any]:
    """The hierarchy as nested nodes; parts are no kinds."""

    def node(identifier: str) -> dict[str, Any]:
        below = [node(child) for child, heads in ABOVE.items() if identifier in heads]
        return {"LabelName": identifier} | ({"Subcategory": below} if below else {})

    roots = [node(identifier) for identifier in IDS if identifier not in ABOVE]
    roots[0]["Part"] = [{"LabelName": "/g/11_x"}]
    return {"LabelName": "/m/0bl9f", "Subcategory": roots}


def closure(identifier: str) -> set[str]:
    """A class and all above it."""
    return {identifier}.union(*(closure(head) for head in ABOVE.get(identifier, [])))


def below(identifier: str) -> set[str]:
    return {other for other in IDS if identifier in closure(other)}


def line(row: Row, clicks: bool = False) -> str:
    image, identifier, (left, top, right, bottom), group = row
    rest = ["-1", "-1", str(group), str(int(left * 100) % 2), "0", *(["0.1", "0.2"] if clicks else [])]
    return ",".join([image, "xclick", identifier, "1", repr(left), repr(right), repr(top), repr(bottom), *rest])


def write_split(
    root: Path, split: str, rows: Iterable[Row], labels: Mapping[str, Mapping[str, int]] | None, clicks: bool = False
) -> None:
    """The boxes of a split, and the verified labels of its images with a few that nobody verified."""
    name = f"oidv6-{split}-annotations-bbox.csv" if clicks else f"{split}-annotations-bbox.csv"
    lines = [CLICKS if clicks else HEADER, *(line(row, clicks) for row in rows)]
    write_text(root / "annotations" / name, "\n".join(lines) + "\n")
    if labels is not None:
        cells = [
            f"{image},verification,{key},{value}" for image, kinds in labels.items() for key, value in kinds.items()
        ]
        machine = [
            f"{image},machine,{IDS[0]},1\n{image},verification,{IDS[1]},0.7" for image in itertools.islice(labels, 2)
        ]
        other = [f"{image},verification,/m/no_box,0" for image in labels]
        text = "\n".join(["ImageID,Source,LabelName,Confidence", *cells, *machine, *other])
        write_text(root / "annotations" / f"{split}-annotations-human-imagelabels-boxable.csv", text)


def write_classes(root: Path, hierarchy: bool = True) -> None:
    lines = [f'{key},"{name}"' if "," in name else f"{key},{name}" for key, name in NAMES.items()]
    write_text(root / "annotations" / "class-descriptions-boxable.csv", "\n".join(lines) + "\n")
    if hierarchy:
        write_text(root / "annotations" / "bbox_labels_600_hierarchy.json", json.dumps(tree()))


def truth(seed: int, split: str) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """Boxes on a grid of 1/20, and labels: of all that has boxes, of some that has none, of some that is not there."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    rows: list[Row] = []
    labels: dict[str, dict[str, int]] = {}
    for number in range(7):
        image = f"{number:015x}{SPLITS.index(split)}"
        kinds = [IDS[place] for place in rng.permutation(len(IDS))]
        shown, labels[image] = kinds[: int(rng.integers(0, 4))], {}
        for kind in shown:
            for _ in range(int(rng.integers(1, 3))):
                (left, top), (right, bottom) = rng.integers(0, 10, 2) / 20, rng.integers(11, 20, 2) / 20
                rows.append((image, kind, (float(left), float(top), float(right), float(bottom)), int(rng.integers(2))))
            labels[image][kind] = 1
        labels[image] |= {kind: int(rng.integers(2)) for kind in kinds[4 : 4 + int(rng.integers(0, 3))]}
    return rows, labels


def expected_annotated(rows: list[Row], labels: Mapping[str, int]) -> set[str]:
    """What is known, said in another way than the reader does: class by class, looking up and down the hierarchy."""
    boxed = {kind for _, own, _, _ in rows for kind in closure(own)}
    known = set()
    for kind in IDS:
        absent = any(labels.get(head) == 0 for head in closure(kind))
        lacks_a_box = any(labels.get(other) == 1 and other not in boxed for other in below(kind))
        if (kind in boxed or absent) and not lacks_a_box:
            known.add(kind)
    return known


def opened(root: Path, tmp_path: Path, cache: str = "cache", **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), tmp_path / cache)


def found(source: DatasetSource, record: ImageRecord) -> list[tuple[str, list[int], bool]]:
    """Names, corners in pixels of an image of 40 x 20, ignored or not; sorted."""
    corners = [[round(value) for value in box] for box in record.boxes.tolist()]
    names = [source.categories[label] for label in record.labels]
    return sorted(zip(names, corners, record.ignore.tolist(), strict=True))


def expected(rows: Iterable[Row]) -> list[tuple[str, list[int], bool]]:
    """The same of written rows. Equal boxes are one, of which the first decides whether it is a group."""
    result: dict[tuple[str, tuple[int, ...]], bool] = {}
    for _, kind, (left, top, right, bottom), group in rows:
        box = (round(left * 40), round(top * 20), round(right * 40), round(bottom * 20))
        for name in (NAMES[key] for key in closure(kind)):
            result.setdefault((name, box), group == 1)
    return sorted((name, list(box), group) for (name, box), group in result.items())


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("hierarchy", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_round_trip(tmp_path: Path, seed: int, hierarchy: bool, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_images_tables, "_BLOCK_BYTES", 1000)  # so that images go over the ends of blocks
    if not hierarchy:
        monkeypatch.setitem(globals(), "ABOVE", {})
    root, made = tmp_path / "data set", {split: truth(seed, split) for split in SPLITS}
    write_classes(root, hierarchy)
    for split, (rows, labels) in made.items():
        if order == "shuffled":
            rows[:] = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]
        write_split(root, split, rows, labels, clicks=split == "train")
        for image in labels:
            save_image(root / split / f"{image}.jpg", 40, 20)
    source = opened(root, tmp_path)
    assert (source.format, source.categories, source.issue_counts) == ("open_images", tuple(NAMES.values()), {})
    for (rows, labels), annotations in zip(made.values(), source.splits.values(), strict=True):
        records = {record.image_id: record for record in annotations}
        for image, verified in labels.items():
            mine = [row for row in rows if row[0] == image]
            kinds = expected_annotated(mine, verified)
            if not mine and not kinds:
                assert image not in records
                continue
            record = records.pop(image)
            assert found(source, record) == expected(mine)
            assert {source.categories[label] for label in record.annotated or ()} == {NAMES[kind] for kind in kinds}
        assert records == {}
    assert list(source.splits) == ["train", "val", "test"]


def tiny(
    tmp_path: Path,
    rows: Iterable[Row] = (),
    labels: Mapping[str, Mapping[str, int]] | None = None,
    images: Iterable[str] = ("a", "b"),
    **options: Any,
) -> DatasetSource:
    """A dataset with one split."""
    root = tmp_path / "data"
    write_classes(root, **options)
    write_split(root, "validation", rows, labels)
    for image in images:
        save_image(root / "validation" / f"{image}.jpg", 40, 20)
    return opened(root, tmp_path)


def known(source: DatasetSource, number: int = 0) -> set[str]:
    return {source.categories[label] for label in source.split("val")[number].annotated or ()}


WHOLE = (0.25, 0.25, 0.75, 0.75)
MAN, PERSON, VEHICLE, CAR, LIMOUSINE, BICYCLE, BOOT = (
    next(key for key, name in NAMES.items() if name.startswith(word))
    for word in ("Man", "Person", "Vehicle", "Car", "Limousine", "Bicycle", "Boot")
)


def test_a_box_is_one_of_all_classes_above(tmp_path: Path) -> None:
    source = tiny(tmp_path, [("a", LIMOUSINE, WHOLE, 1), ("a", MAN, WHOLE, 0)], {})
    boxes = [
        ("Car", [10, 5, 30, 15], True),
        ("Limousine", [10, 5, 30, 15], True),
        ("Man", [10, 5, 30, 15], False),
        ("Person", [10, 5, 30, 15], False),
        ("Vehicle", [10, 5, 30, 15], True),
    ]
    assert found(source, source.split("val")[0]) == boxes


def test_boxes_that_were_expanded_already_are_not_doubled(tmp_path: Path) -> None:
    rows = [("a", kind, WHOLE, 0) for kind in (LIMOUSINE, CAR, VEHICLE)]
    assert len(tiny(tmp_path, rows, {}).split("val")[0].boxes) == 3


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({}, {"Car", "Vehicle"}),
        ({CAR: 1}, {"Car", "Vehicle"}),
        ({PERSON: 0}, {"Car", "Vehicle", "Person", "Man"}),  # where nobody is, no man is
        ({MAN: 0}, {"Car", "Vehicle", "Man"}),
        ({BICYCLE: 1}, {"Car"}),  # a bicycle without a box: vehicles have not all got one
        ({LIMOUSINE: 1}, set()),
        ({MAN: 1}, {"Car", "Vehicle"}),
        ({VEHICLE: 1}, {"Car", "Vehicle"}),  # the box of the car is one of a vehicle
    ],
)
def test_what_is_known(tmp_path: Path, labels: dict[str, int], names: set[str]) -> None:
    assert known(tiny(tmp_path, [("a", CAR, WHOLE, 0)], {"a": labels})) == names


def test_without_hierarchy_a_box_is_of_its_own_class_alone(tmp_path: Path) -> None:
    """Then a man is no box of a person who is known to be there."""
    source = tiny(tmp_path, [("a", MAN, WHOLE, 0)], {"a": {PERSON: 1, VEHICLE: 0}}, hierarchy=False)
    assert len(source.split("val")[0].boxes) == 1
    assert known(source) == {"Man", "Vehicle"}


def test_without_verified_labels_only_boxes_are_known(tmp_path: Path) -> None:
    source = tiny(tmp_path, [("a", CAR, WHOLE, 0), ("b", BOOT, WHOLE, 1)])
    assert source.issue_counts == {"no verified labels": 1}
    assert "only the categories with boxes" in source.issues[0].detail
    assert (known(source, 0), known(source, 1)) == ({"Car", "Vehicle"}, {"Boot"})


def test_images_without_boxes_teach_what_is_not_there(tmp_path: Path) -> None:
    """But those that are not there are no issue, nor are those of which nothing is known."""
    labels = {"a": {CAR: 1}, "b": {VEHICLE: 0}, "c": {CAR: 1}, "d": {CAR: 0}}
    source = tiny(tmp_path, [("a", CAR, WHOLE, 0)], labels, "abc")
    assert [record.image_id for record in source.split("val")] == ["a", "b"]
    assert known(source, 1) == {"Vehicle", "Car", "Limousine", "Bicycle, bike"}
    assert source.issue_counts == {}


def test_labels_that_come_later_are_seen(tmp_path: Path) -> None:
    tiny(tmp_path, [("a", CAR, WHOLE, 0)])
    assert known(tiny(tmp_path, [("a", CAR, WHOLE, 0)], {"a": {BOOT: 0}})) == {"Car", "Vehicle", "Boot"}


def fiftyone(root: Path) -> None:
    """The layout that FiftyOne downloads."""
    for split in ("train", "validation"):
        write_text(root / split / "labels" / "detections.csv", f"{HEADER}\n{line(('a', CAR, WHOLE, 0))}")
        write_text(
            root / split / "labels" / "classifications.csv", f"ImageID,Source,LabelName,Confidence\na,x,{BOOT},0"
        )
        write_text(root / split / "metadata" / "classes.csv", "\n".join(f"{key},{NAMES[key][:3]}" for key in IDS))
        write_text(root / split / "metadata" / "hierarchy.json", json.dumps(tree()))
        save_image(root / split / "data" / "a.jpg", 40, 20)


def version_7(root: Path) -> None:
    """Names of V7, whose file of classes has a header, with all that may lie beside, and images as PNG."""
    rows = {
        "class-descriptions-boxable": "LabelName,DisplayName\n" + "\n".join(f"{key},{NAMES[key][:3]}" for key in IDS)
    }
    rows["class-descriptions"] = f"LabelName,DisplayName\n/m/0,Zero\n{CAR},Auto"
    for split in ("train", "validation"):
        rows[f"{split}-annotations-bbox"] = f"{HEADER}\n{line(('a', CAR, WHOLE, 0))}"
        rows[f"{split}-annotations-human-imagelabels-boxable"] = f"ImageID,Source,LabelName,Confidence\na,x,{BOOT},0"
        rows[f"{split}-annotations-human-imagelabels"] = f"ImageID,Source,LabelName,Confidence\na,x,{PERSON},0"
        rows[f"{split}-annotations-machine-imagelabels"] = f"ImageID,Source,LabelName,Confidence\na,machine,{PERSON},0"
        rows[f"{split}-images-with-rotation"] = "ImageID,Subset,OriginalURL,Rotation\na,train,http://x,0.0"
        rows[f"{split}-annotations-vrd"] = "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1"
        save_image(root / "images" / split / "a.png", 40, 20)
    for name, text in rows.items():
        write_text(root / "csv_folder" / f"oidv7-{name}.csv", text)
    write_text(root / "csv_folder" / "bbox_labels_600_hierarchy.json", json.dumps(tree()))


@pytest.mark.parametrize("write", [fiftyone, version_7])
def test_layouts(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "data")
    source = opened(tmp_path / "data", tmp_path)
    assert source.categories == tuple(name[:3] for name in NAMES.values())
    assert (list(source.splits), source.issue_counts) == (["train", "val"], {})
    for annotations in source.splits.values():
        (record,) = annotations
        assert [source.categories[label] for label in record.labels] == ["Car", "Veh"]
        assert {source.categories[label] for label in record.annotated or ()} == {"Car", "Veh", "Boo"}


def test_one_file_is_a_dataset(tmp_path: Path) -> None:
    tiny(tmp_path, [("a", CAR, WHOLE, 0)], {"a": {BOOT: 0}})
    file = tmp_path / "data" / "annotations" / "validation-annotations-bbox.csv"
    source = opened(file, tmp_path)
    assert (source.format, list(source.splits), known(source)) == ("open_images", ["val"], {"Car", "Vehicle", "Boot"})


def test_recognition(tmp_path: Path) -> None:
    """CSV of other kinds stays CSV, also where its columns are called as here; boxes alone do not suffice."""
    csv_header(tmp_path / "csv", made_up())
    write_text(tmp_path / "names" / "train.csv", f"{HEADER}\n{line(('a', 'cat', WHOLE, 0))}")
    assert [recognise(tmp_path / name).format for name in ("csv", "names")] == ["csv", "csv"]
    write_text(tmp_path / "bare" / "train-annotations-bbox.csv", f"{HEADER}\n{line(('a', CAR, WHOLE, 0))}")
    with pytest.raises(DataError, match="no file with the names of the classes") as caught:
        recognise(tmp_path / "bare")
    assert "class-descriptions-boxable.csv" in str(caught.value)
    assert recognise(tmp_path / "bare", "csv").format == "csv"
    for name in ("csv", "names"):
        with pytest.raises(DataError, match="no annotations of a known format"):
            recognise(tmp_path / name, "open_images")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (line(("b", CAR, WHOLE, 0)).replace("0.25", "wide"), "unreadable box"),
        (line(("b", CAR, WHOLE, 0)).replace("0.25", ""), "unreadable box"),
        (line(("b", CAR, WHOLE, 0)).replace("0.75", "0.25"), "degenerate box"),
        (line(("b", CAR, WHOLE, 0)).replace("0.75", "inf"), "unreadable box"),
        (line(("b", "/m/unheard_of", WHOLE, 0)), "unknown category"),
        (line(("", CAR, WHOLE, 0)), "unreadable annotation"),
        (line(("z", CAR, WHOLE, 0)), "missing image"),
        (line(("../../a", CAR, WHOLE, 0)), "path outside"),
        ("b,xclick", "unreadable annotation"),
        ('b,"xclick', "unreadable annotation"),
        (line(("b", CAR, WHOLE, 0)) + ",1", "unreadable annotation"),
    ],
)
def test_wrong_rows_are_dropped_and_counted(tmp_path: Path, row: str, kind: str) -> None:
    root = tmp_path / "data"
    tiny(tmp_path, [("a", BOOT, WHOLE, 0)], {"a": {}}, hierarchy=False)
    good = [line(("a", BOOT, WHOLE, 0)), line(("b", BOOT, WHOLE, 0))]
    file = write_text(
        root / "annotations" / "validation-annotations-bbox.csv", "\n".join([HEADER, good[0], row, good[1]])
    )
    save_image(tmp_path / "a.jpg", 40, 20)
    source = opened(root, tmp_path)
    assert source.issue_counts == {kind: 1}
    assert file.name in source.issues[0].where
    assert [len(record.boxes) for record in source.split("val")] == [1, 1]


def test_quoted_cells(tmp_path: Path) -> None:
    tiny(tmp_path, [("a", BOOT, WHOLE, 0)], {})
    quoted = "\r\n".join(
        ",".join(f'"{cell}"' for cell in row.split(",")) for row in (HEADER, line(("a", CAR, WHOLE, 1)))
    )
    write_text(tmp_path / "data" / "annotations" / "validation-annotations-bbox.csv", f"\ufeff{quoted}\r\n")
    source = opened(tmp_path / "data", tmp_path)
    assert found(source, source.split("val")[0]) == expected([("a", CAR, WHOLE, 1)])
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    "text", ['{"LabelName": "/m/0", "Subcategory": [3]}', '{"LabelName": "/m/0", "Subcategory": [']
)
def test_a_damaged_hierarchy_is_one_error(tmp_path: Path, text: str) -> None:
    tiny(tmp_path, [("a", CAR, WHOLE, 0)], {})
    file = write_text(tmp_path / "data" / "annotations" / "bbox_labels_600_hierarchy.json", text)
    with pytest.raises(DataError, match="not readable as a hierarchy") as caught:
        opened(tmp_path / "data", tmp_path)
    assert caught.value.where == file


def test_damaged_files(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_classes(root)
    for split in SPLITS:
        rows, labels = truth(0, split)
        write_split(root, split, rows, labels)
        for image in labels:
            save_image(root / split / f"{image}.jpg", 40, 20)
    files, rng = sorted((root / "annotations").iterdir()), np.random.default_rng(0)
    for number in range(12):
        path = files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        with contextlib.suppress(MetrError):
            source = opened(root, tmp_path, f"cache {number}")
            for record in (record for annotations in source.splits.values() for record in annotations):
                assert record.labels.max(initial=0) < len(source.categories)
                assert set(record.annotated or ()) <= set(range(len(source.categories)))
        path.write_bytes(whole)
