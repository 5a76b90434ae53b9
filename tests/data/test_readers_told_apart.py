"""No format is mistaken for another, and files of other kinds are not recognised."""

import json
from pathlib import Path

import pytest
from line_trees import LINE_LAYOUTS, labelme_beside, write_lines
from reader_trees import LAYOUTS, coco_content, coco_plain, made_up, save_image, write_json, write_text
from tool_trees import BENCHMARKS, TOOL_LAYOUTS

from metr.data.formats.registry import READERS, recognise
from metr.errors import DataError

ALL = LAYOUTS | LINE_LAYOUTS | TOOL_LAYOUTS


@pytest.mark.parametrize("layout", ALL)
def test_a_layout_fits_its_own_format_alone(tmp_path: Path, layout: str) -> None:
    expected, write = ALL[layout]
    write(tmp_path, made_up())
    assert [reader.format for reader in READERS if reader.recognise(tmp_path) is not None] == [expected]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_benchmark_fits_its_own_format_alone(tmp_path: Path, benchmark: str) -> None:
    expected, write = BENCHMARKS[benchmark]
    write(tmp_path)
    assert [reader.format for reader in READERS if reader.recognise(tmp_path) is not None] == [expected]


@pytest.mark.parametrize(
    "rows",
    [
        [{"file_name": "a.jpg", "text": "a caption"}],
        [{"filename": "a.jpg", "caption": "grounding"}],
        [{"ID": "a"}],
        [["filename", "detection"]],
        ["filename"],
    ],
)
@pytest.mark.parametrize("name", ["metadata.jsonl", "train.json", "annotation_train.odgt"])
def test_other_lines_are_not_recognised(tmp_path: Path, rows: list[object], name: str) -> None:
    save_image(tmp_path / "a.jpg")
    write_lines(tmp_path / name, rows)
    with pytest.raises(DataError, match="no annotations of a known format"):
        recognise(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "train.json", "annotation_train.odgt"])
def test_lines_with_objects_are_imagefolder_where_they_are_called_so(tmp_path: Path, name: str) -> None:
    save_image(tmp_path / "a.jpg")
    write_lines(tmp_path / name, [{"image": "a.jpg", "objects": {"bbox": [], "categories": []}}])
    fits = [reader.format for reader in READERS if reader.recognise(tmp_path) is not None]
    assert fits == (["imagefolder"] if name == "metadata.jsonl" else [])


@pytest.mark.parametrize(
    "content",
    [
        {"shapes": []},
        {"imagePath": "a.jpg", "imageData": None},
        {"categories": [{"name": "shapes"}], "classes": ["imagePath"]},
        [{"shapes": [], "imagePath": "a.jpg"}],
    ],
)
def test_other_json_is_not_labelme(tmp_path: Path, content: object) -> None:
    save_image(tmp_path / "a.jpg")
    write_json(tmp_path / "a.json", content)
    with pytest.raises(DataError, match="no annotations of a known format"):
        recognise(tmp_path, "labelme")


def test_coco_whose_categories_are_called_like_labelme_keys(tmp_path: Path) -> None:
    content = coco_content(made_up()["train"])
    content["categories"] += [
        {"id": 7, "name": "shapes"},
        {"id": 8, "name": "filename"},
        {"id": 9, "name": "detection"},
    ]
    for indent in (None, 1):
        write_text(tmp_path / "train.json", json.dumps(content, indent=indent))
        assert recognise(tmp_path).format == "coco"
        for name in ("labelme", "odvg"):
            with pytest.raises(DataError):
                recognise(tmp_path, name)


def test_a_folder_of_labelme_and_coco_is_coco_and_can_be_labelme(tmp_path: Path) -> None:
    truth = made_up()
    labelme_beside(tmp_path, truth)
    coco_plain(tmp_path, truth)
    assert recognise(tmp_path).format == "coco"
    assert recognise(tmp_path, "labelme").format == "labelme"
