import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metr.data.records import ImageRecord
from metr.errors import MetrError
from metr.inference.draw import (
    PAPER,
    Mark,
    Style,
    _free_place,
    _on,
    category_colour,
    contact_sheet,
    detection_marks,
    draw,
    draw_annotations,
    draw_detections,
    font_file,
    legible,
    palette,
    save_image,
    side_by_side,
)
from metr.structures import Detections

GREY = np.full((240, 320, 3), 127, dtype=np.uint8)


def share_of(colour: tuple[int, int, int], pixels: np.ndarray) -> float:
    return float((pixels == np.array(colour, dtype=np.uint8)).all(-1).mean())


def shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)


def make_detections() -> Detections:
    return Detections(
        boxes=torch.tensor([[100.0, 60, 200, 160], [20, 100, 60, 200], [250, 30, 300, 60]]),
        scores=torch.tensor([0.9, 0.5, 0.1]),
        labels=torch.tensor([1, 0, 1]),
        names=("cat", "dog"),
    )


def make_record() -> ImageRecord:
    boxes = np.array([[100, 60, 200, 160], [20, 100, 60, 200]], dtype=np.float32)
    return ImageRecord(
        image_id=1,
        path=Path("1.jpg"),
        width=320,
        height=240,
        boxes=boxes,
        labels=np.array([1, 0]),
        areas=np.array([10000.0, 4000.0]),
        ignore=np.array([False, True]),
    )


def test_boxes_stand_where_they_should_and_the_image_is_left_alone() -> None:
    before = GREY.copy()
    drawn = draw_detections(GREY, make_detections())
    assert np.array_equal(GREY, before)
    assert drawn.shape == GREY.shape
    for name, column, rows in (("dog", 200, slice(60, 160)), ("cat", 20, slice(100, 200))):
        assert share_of(category_colour(name), drawn[rows, column]) == 1
    # inside of the boxes, and around the one whose score is too low
    assert np.array_equal(drawn[90:150, 110:190], GREY[90:150, 110:190])
    assert np.array_equal(drawn[20:50, 210:], GREY[20:50, 210:])


def test_boxes_grow_with_the_image() -> None:
    drawn = draw_detections(GREY, make_detections(), longest=640)
    assert drawn.shape == (480, 640, 3)
    assert share_of(category_colour("dog"), drawn[120:320, 400]) == 1


def test_crowds_are_dashed() -> None:
    drawn = draw_annotations(GREY, make_record(), ("cat", "dog"))
    assert share_of(category_colour("dog"), drawn[60:160, 200]) == 1
    assert 0.3 < share_of(category_colour("cat"), drawn[100:200, 60]) < 0.75


def test_small_boxes_lie_above_large_ones() -> None:
    small, large = Mark(box=(50.0, 50.0, 150.0, 90.0), name="cat"), Mark(box=(50.0, 50.0, 300.0, 200.0), name="dog")
    for marks in ([small, large], [large, small]):
        assert share_of(category_colour("cat"), draw(GREY, marks)[68:88, 50]) == 1


def test_a_name_has_one_colour_with_readable_text() -> None:
    assert category_colour("cat") == (77, 255, 220)  # in every process, for ever
    for number in range(200):
        colour = category_colour(f"name {number}")
        assert max(colour) - min(colour) > 90
        light = [sum(w * c for w, c in zip((0.299, 0.587, 0.114), one, strict=True)) for one in (colour, _on(colour))]
        assert abs(light[0] - light[1]) > 100


def test_labels_keep_off_labels_and_other_objects() -> None:
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 500, (250, 2))
    marks = [Mark(box=(x, y, x + 40, y + 40), name="cell", score=0.5) for x, y in corners.tolist()]
    placed: list[tuple[float, ...]] = []
    for mark in marks:
        others = [other.box for other in marks if other is not mark]
        labels, boxes = np.array(placed).reshape(-1, 4), np.array(others)
        if found := _free_place(mark.box, mark.texts, 12, (540, 540), labels, boxes, np.full(249, 0.3 * 1600)):
            text, area = found
            assert text in mark.texts
            assert all(shared(area, box) <= 0.3 * 1600 for box in others)
            assert all(shared(area, label) <= 0.1 * (area[2] - area[0]) * (area[3] - area[1]) for label in placed)
            assert 0 <= area[0] < area[2] <= 540
            assert 0 <= area[1] < area[3] <= 540
            placed.append(area)
    assert 20 < len(placed) < 250


def test_the_best_of_each_category_is_named_however_crowded() -> None:
    marks = [Mark(box=(100.0, 100.0, 130.0, 112.0), name=name, score=0.9) for name in ("cat", "dog")]
    drawn = draw(GREY, marks)
    assert all(share_of(category_colour(name), drawn) > 0.002 for name in ("cat", "dog"))


@pytest.mark.parametrize(
    "box", [(-50.0, -50.0, 900.0, 900.0), (400.0, 300.0, 500.0, 400.0), (9.0, 9.0, 9.0, 9.0)], ids=str
)
def test_boxes_across_the_border_and_without_area_do_no_harm(box: tuple[float, float, float, float]) -> None:
    for dashed in (False, True):
        assert (
            draw(GREY, [Mark(box=box, name="a very long name indeed " * 9, score=1.0, dashed=dashed)]).shape
            == GREY.shape
        )


def test_letters_that_no_font_has_are_spelt() -> None:
    assert legible("кошка, γάτα, Katze") == "кошка, γάτα, Katze"
    private = "\U000f1234 cat"
    assert legible(private) == "U+F1234  cat"
    assert font_file("cat").name == "DejaVuSans.ttf"
    assert draw(GREY, [Mark(box=(9.0, 99.0, 99.0, 199.0), name=private)]).shape == GREY.shape


def test_marks_are_limited() -> None:
    marks = detection_marks(make_detections(), limit=1)
    assert [(mark.name, mark.texts) for mark in marks] == [("dog", ("dog 0.90", "0.90"))]
    assert marks[0].area == 10000
    assert len(detection_marks(make_detections(), 0.3)) == 2


def test_a_sheet_has_room_for_every_image_and_caption() -> None:
    red, blue = np.zeros((100, 300, 3), np.uint8), np.zeros((200, 100, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet([red, blue, red], ["first", "second " * 40, ""], columns=2, cell=150)
    gap, header = 8, round(12 * 1.6)
    assert sheet.shape == (150 + 50 + 2 * (gap + header) + gap, 2 * 150 + 3 * gap, 3)
    assert share_of((255, 0, 0), sheet) * sheet[..., 0].size == pytest.approx(2 * 150 * 50)
    assert share_of((0, 0, 255), sheet) * sheet[..., 0].size == pytest.approx(75 * 150)
    assert sheet[0, 0].tolist() == list(PAPER)
    assert contact_sheet([red], columns=5, cell=400).shape == (100 + 2 * gap, 300 + 2 * gap, 3)
    for faulty in ([], [red]):
        with pytest.raises(MetrError, match="as many captions"):
            contact_sheet(faulty, ["a", "b"])


def test_truth_stands_beside_detections() -> None:
    sheet = side_by_side(GREY, [], detection_marks(make_detections()), longest=320)
    middle = sheet.shape[1] // 2
    assert share_of(category_colour("dog"), sheet[:, :middle]) == 0
    assert share_of(category_colour("dog"), sheet[:, middle:]) > 0.001


def test_images_are_saved_or_the_reason_is_said(tmp_path: Path) -> None:
    save_image(GREY, tmp_path / "deep" / "image.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "image.png")), GREY)
    with pytest.raises(MetrError, match=r"image\.what: cannot write"):
        save_image(GREY, tmp_path / "image.what")
    (tmp_path / "file").write_text("")
    with pytest.raises(MetrError, match="cannot be written"):
        save_image(GREY, tmp_path / "file" / "image.png")


def test_colours_of_one_list_differ() -> None:
    colours = palette([f"name {number}" for number in range(48)])
    pairs = itertools.combinations(colours.values(), 2)
    assert min(sum(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in pairs) > 30
    few = list(palette(["RBC", "WBC", "Platelets"]).values())
    assert min(sum(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in itertools.combinations(few, 2)) > 200


def test_a_style_decides_labels_and_colours() -> None:
    marks = [Mark(box=(20.0, 30.0, 90.0, 90.0), name="cat", score=0.8)]
    bare = draw(GREY, marks, style=Style(labels="none", colours={"cat": (255, 0, 0)}))
    assert share_of((255, 0, 0), bare[60:61, 20:21]) == 1
    assert share_of((255, 0, 0), bare) < 0.02
    numbers, names = (draw(GREY, marks, style=Style(labels=labels)) for labels in ("scores", "names"))
    assert share_of(category_colour("cat"), bare) == 0
    assert 0 < share_of(category_colour("cat"), numbers) < share_of(category_colour("cat"), names)
