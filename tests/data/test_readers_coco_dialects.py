"""COCO JSON as tools write it: ids of two types, names that are no texts, boxes that are missing or of another kind."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats.box_kinds import BoxKind
from metr.data.formats.coco_outlines import outline_box
from metr.errors import DataError

WIDTH, HEIGHT = 100, 80
# Corners of boxes that as x, y, width, height leave their images.
CORNERS = [[50, 40, 90, 70], [10, 5, 60, 50], [60, 10, 99, 20], [5, 50, 40, 79], [30, 30, 80, 60], [20, 2, 45, 75]]


def opened(root: Path, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / "cache")


def coco(
    root: Path,
    annotations: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]] = ({"id": 1, "file_name": "a.jpg"},),
    categories: Sequence[Mapping[str, Any]] = ({"id": 7, "name": "cat"},),
    file: str = "annotations/instances_val.json",
) -> Path:
    """A file of one split with the images a.jpg and b.jpg, and its folder."""
    for name in ("a.jpg", "b.jpg"):
        save_image(root / "val" / name, WIDTH, HEIGHT)
    sized = [{"width": WIDTH, "height": HEIGHT} | image for image in images]
    boxes = [{"id": number, "image_id": 1, "category_id": 7} | item for number, item in enumerate(annotations)]
    write_json(root / file, {"images": sized, "annotations": boxes, "categories": categories})
    return root


def lefts(source: DatasetSource) -> dict[str, list[float]]:
    return {record.path.name: record.boxes[:, 0].tolist() for record in source.split("val")}


BOX = [2, 3, 10, 20]


@pytest.mark.parametrize(
    ("listed", "used"), [(1, "1"), ("1", 1), (139, "000000000139"), ("000000000139", 139), ("01", "1"), (0, "0")]
)
def test_image_ids_of_two_types(tmp_path: Path, listed: int | str, used: int | str) -> None:
    images = [{"id": listed, "file_name": "a.jpg"}, {"id": 77, "file_name": "b.jpg"}]
    source = opened(coco(tmp_path / "data", [{"bbox": BOX, "image_id": used}], images))
    assert lefts(source) == {"a.jpg": [2], "b.jpg": []}
    assert source.issue_counts == {"ids of two types": 1}


@pytest.mark.parametrize(("listed", "used"), [(7, "7"), ("7", 7)])
def test_category_ids_of_two_types(tmp_path: Path, listed: int | str, used: int | str) -> None:
    categories = [{"id": listed, "name": "cat"}, {"id": 8, "name": "dog"}]
    source = opened(coco(tmp_path / "data", [{"bbox": BOX, "category_id": used}], categories=categories))
    assert source.split("val")[0].labels.tolist() == [0]
    assert source.issue_counts == {"ids of two types": 1}


def test_ids_that_differ_in_type_alone_stay_apart(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "b.jpg"}]
    boxes = [{"bbox": BOX, "image_id": 1}, {"bbox": [5, *BOX[1:]], "image_id": "1"}, {"bbox": BOX, "image_id": "01"}]
    source = opened(coco(tmp_path / "data", boxes, images))
    assert lefts(source) == {"a.jpg": [2], "b.jpg": [5]}
    assert source.issue_counts == {"unknown image": 1}


@pytest.mark.parametrize(
    ("written", "name"),
    [("1", "1"), ("2.50", "2.50"), ("true", "true"), ("null", "null"), ('"no"', "no"), ("007", None)],
)
def test_names_that_are_no_texts_are_taken_as_written(tmp_path: Path, written: str, name: str | None) -> None:
    root = coco(tmp_path / "data", [{"bbox": BOX}])
    file = root / "annotations" / "instances_val.json"
    write_text(file, file.read_text().replace('"name": "cat"', f'"name": {written}, "supercategory": 5'))
    if name is None:
        with pytest.raises(DataError, match="not readable as COCO JSON"):
            opened(root)
    else:
        assert opened(root).categories == (name,)


@pytest.mark.parametrize("written", ["[1]", '{"en": "cat"}'])
def test_a_name_that_is_a_list_is_one_clear_error(tmp_path: Path, written: str) -> None:
    root = coco(tmp_path / "data", [{"bbox": BOX}])
    file = root / "annotations" / "instances_val.json"
    write_text(file, file.read_text().replace('"name": "cat"', f'"name": {written}'))
    with pytest.raises(DataError, match="a category's name is"):
        opened(root)


def mask(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    found = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    found[top:bottom, left:right] = 1
    return found


def run_lengths(pixels: np.ndarray) -> dict[str, Any]:
    flat = np.concatenate([[0], pixels.T.reshape(-1), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff([0, *edges.tolist(), pixels.size])
    return {"size": list(pixels.shape), "counts": counts.tolist()}


def compressed(pixels: np.ndarray) -> dict[str, Any]:
    from faster_coco_eval import mask as masks

    found = masks.encode(np.asfortranarray(pixels))
    return {"size": list(pixels.shape), "counts": found["counts"].decode()}


def polygon(pixels: np.ndarray) -> Any:
    rows, columns = np.nonzero(pixels)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    return [
        [int(value) for value in (left, top, right, top, right, bottom)],
        [int(left), int(bottom), int(left), int(top)],
    ]


@pytest.mark.parametrize("outline", [run_lengths, compressed, polygon])
@pytest.mark.parametrize("bbox", [{}, {"bbox": None}, {"bbox": []}, {"bbox": [0, 0, 0, 0]}])
def test_the_box_around_a_segmentation(tmp_path: Path, outline: Callable[[Any], Any], bbox: dict[str, Any]) -> None:
    corners = [[5, 7, 30, 40], [0, 0, WIDTH, HEIGHT], [99, 79, 100, 80], [0, 10, 1, 80], [3, 0, 50, HEIGHT]]
    boxes: list[dict[str, Any]] = [bbox | {"segmentation": outline(mask(*box))} for box in corners]
    source = opened(coco(tmp_path / "data", [*boxes, {"bbox": BOX}]))
    assert source.split("val")[0].boxes.tolist() == [*corners, [2, 3, 12, 23]]
    assert source.issue_counts == {"box of a segmentation": 1}


def test_ragged_masks() -> None:
    pixels = mask(10, 5, 20, 30) | mask(18, 2, 25, 9) | mask(60, 70, 61, 71)
    assert outline_box(run_lengths(pixels)) == outline_box(compressed(pixels)) == [10, 2, 51, 69]
    assert outline_box([run_lengths(mask(1, 2, 3, 4)), run_lengths(mask(5, 6, 7, 8))]) == [1, 2, 6, 6]


@pytest.mark.parametrize(
    "value",
    [
        *(None, [], {}, [[]], "x", 5, [[1, 2, 3]], [["a", "b", "c", "d"]], {"counts": [1], "size": [2, 2]}),
        *({"counts": [1, 9], "size": [2, 2]}, {"counts": "\x00", "size": [2, 2]}, {"counts": None, "size": [2]}),
        *({"counts": [-1, 2], "size": [2, 2]}, [[1, float("nan"), 2, 3]], {"counts": [0, 10**30], "size": [2, 2]}),
    ],
)
def test_segmentations_that_are_none(value: Any) -> None:
    assert outline_box(value) is None


def test_annotations_without_any_outline_stay_unreadable(tmp_path: Path) -> None:
    source = opened(coco(tmp_path / "data", [{"bbox": BOX}, {"segmentation": []}, {}]))
    assert source.issue_counts == {"unreadable box": 2}


def test_person_keypoints_alone_are_read(tmp_path: Path) -> None:
    root = coco(
        tmp_path / "data", [{"bbox": BOX, "keypoints": [1, 2, 2]}], file="annotations/person_keypoints_val.json"
    )
    assert lefts(opened(root)) == {"a.jpg": [2]}
    coco(root, [{"bbox": [5, *BOX[1:]]}])
    assert lefts(opened(root)) == {"a.jpg": [5]}


def test_images_that_share_an_id_are_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "val" / "c.jpg", WIDTH, HEIGHT)
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 1, "file_name": "c.jpg"}]
    source = opened(coco(tmp_path / "data", [{"bbox": BOX}, {"bbox": BOX, "image_id": 2}], images))
    assert lefts(source) == {"b.jpg": [2]}
    assert source.issue_counts == {"duplicate image id": 1}
    assert "a.jpg and c.jpg" in source.issues[0].detail


def test_where_all_share_their_ids_nothing_is_read(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]
    with pytest.raises(DataError, match="duplicate image id"):
        opened(coco(tmp_path / "data", [{"bbox": BOX}], images))


def as_kind(kind: str) -> list[list[float]]:
    """`CORNERS` as boxes of a kind."""
    boxes = np.array(CORNERS, dtype=np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    found = {"xyxy": boxes, "xywh": np.hstack([boxes[:, :2], sides])}
    found["cxcywh"] = np.hstack([boxes[:, :2] + sides / 2, sides])
    plain, unit = found[kind.rstrip("n%")], {"n": 1.0, "%": 100.0}.get(kind[-1])
    return (plain if unit is None else plain / [WIDTH, HEIGHT, WIDTH, HEIGHT] * unit).tolist()


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        ("xywh", set()),
        ("xyxy", {"boxes are not xywh"}),
        ("xywhn", {"boxes are fractions"}),
        ("xyxyn", {"boxes are fractions", "boxes are not xywh"}),
    ],
)
def test_boxes_of_another_kind(tmp_path: Path, kind: str, notes: set[str], sized: bool) -> None:
    image = {"id": 1, "file_name": "a.jpg"} | ({} if sized else {"width": None, "height": None})
    root = coco(tmp_path / "data", [{"bbox": box} for box in as_kind(kind)], [image])
    source = opened(root)
    np.testing.assert_allclose(source.split("val")[0].boxes, CORNERS, rtol=1e-5)
    assert set(source.issue_counts) == notes


@pytest.mark.parametrize("kind", get_args(BoxKind))
def test_what_the_user_says_of_boxes_is_done(tmp_path: Path, kind: str) -> None:
    outline = {"segmentation": [[2, 3, 12, 3, 12, 23]]}
    root = coco(tmp_path / "data", [*({"bbox": box} for box in as_kind(kind)), outline])
    source = opened(root, boxes=kind)
    np.testing.assert_allclose(source.split("val")[0].boxes, [*CORNERS, [2, 3, 12, 23]], rtol=1e-5)
    assert source.issue_counts == {"box of a segmentation": 1}


def test_the_option_enters_the_cache(tmp_path: Path) -> None:
    root = coco(tmp_path / "data", [{"bbox": box} for box in CORNERS])
    assert opened(root).split("val")[0].boxes.tolist() == CORNERS
    assert opened(root, boxes="xywh").split("val")[0].boxes.tolist() != CORNERS
    assert opened(root, boxes="xyxy").issue_counts == {}


def test_a_few_boxes_that_leave_the_image_change_nothing(tmp_path: Path) -> None:
    root = coco(tmp_path / "data", [{"bbox": box} for box in [*as_kind("xywh"), [60, 5, 90, 70], [60, 5, 90, 70]]])
    source = opened(root)
    assert source.split("val")[0].boxes[:6].tolist() == CORNERS
    assert source.issue_counts == {"box clipped": 2}


def test_boxes_that_no_kind_fits_are_said(tmp_path: Path) -> None:
    root = coco(tmp_path / "data", [{"bbox": box} for box in [*CORNERS, [5, 5, 5, 9]]])
    source = opened(root)
    assert source.issue_counts["boxes are doubtful"] == 1
    note = next(issue for issue in source.issues if issue.kind == "boxes are doubtful")
    assert "1 cannot be corners" in note.detail
    assert "`boxes` in a datasets file" in note.detail


def test_formats_whose_boxes_are_settled_refuse_the_option(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "images" / "val" / "a.jpg")
    write_text(tmp_path / "data" / "labels" / "val" / "a.txt", "0 0.5 0.5 0.5 0.5")
    write_text(tmp_path / "data" / "data.yaml", "names: [cat]\nval: images/val\n")
    with pytest.raises(DataError, match=r"`boxes`.*yolo"):
        opened(tmp_path / "data", boxes="xyxy")
