"""What is not read is named with the way out."""

import json
from pathlib import Path

import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.formats.registry import recognise
from metr.errors import DataError

DARWIN = {"version": "2.0", "schema_ref": "https://darwin", "item": {"name": "a.jpg"}, "annotations": [{"name": "cat"}]}
VIA_3 = {"project": {"pid": "x"}, "config": {}, "attribute": {}, "file": {}, "metadata": {}, "view": {}}


def named(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        recognise(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "name", "way_out"),
    [
        ("meta.json", {"classes": [{"title": "cat", "shape": "rectangle"}], "tags": []}, "Supervisely", "COCO"),
        ("ds/ann/a.jpg.json", {"size": {}, "objects": [{"classTitle": "cat", "points": {}}]}, "Supervisely", "COCO"),
        ("a.json", DARWIN, "V7 Darwin", "darwin convert coco"),
        ("tasks.json", [{"task_id": "1", "response": {"annotations": []}, "params": {}}], "Scale AI", "COCO"),
        ("via_project.json", VIA_3, "VGG Image Annotator 3", "VIA 2"),
        ("labels/a.json", {"name": "a", "frames": [{"timestamp": 1, "objects": []}]}, "BDD100K", "det_20"),
        ("export.json", {"data_row": {"id": "x"}, "projects": {}}, "Labelbox", "COCO"),
    ],
)
def test_json_of_other_tools(tmp_path: Path, file: str, content: object, name: str, way_out: str) -> None:
    save_image(tmp_path / "a.jpg")
    write_json(tmp_path / file, content)
    message = named(tmp_path)
    assert name in message
    assert way_out in message.split("try:")[1]


def test_lines_of_labelbox(tmp_path: Path) -> None:
    rows = [{"data_row": {"id": str(number), "external_id": "a.jpg"}, "projects": {}} for number in range(2)]
    write_text(tmp_path / "export.ndjson", "\n".join(map(json.dumps, rows)))
    assert "Labelbox" in named(tmp_path)
    assert "Labelbox" in named(tmp_path / "export.ndjson")


def test_cvat_for_video(tmp_path: Path) -> None:
    track = '<track id="0" label="cat"><box frame="0" xtl="1" ytl="2" xbr="3" ybr="4"></box></track>'
    write_text(tmp_path / "annotations.xml", f"<annotations><version>1.1</version><meta></meta>{track}</annotations>")
    message = named(tmp_path)
    assert "CVAT for video" in message
    assert "CVAT for images 1.1" in message.split("try:")[1]


def test_videos_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "clips" / "a.MP4", "")
    assert "found videos" in named(tmp_path)
    assert "ffmpeg" in named(tmp_path / "clips" / "a.MP4")
    save_image(tmp_path / "clips" / "a.jpg")
    assert "found videos" not in named(tmp_path)


@pytest.mark.parametrize("base", ["", "train/"])
def test_folders_of_classes(tmp_path: Path, base: str) -> None:
    for name in ("cat", "dog"):
        save_image(tmp_path / base / name / "a.jpg")
    write_text(tmp_path / "README.txt", "cats and dogs")
    assert "one for each class" in named(tmp_path)
    write_text(tmp_path / "boxes.txt", "unknown boxes")
    assert "no annotations of a known format" in named(tmp_path)


@pytest.mark.parametrize("folder", ["masks", "train/masks", "SegmentationClass", "gt_masks"])
def test_masks_alone(tmp_path: Path, folder: str) -> None:
    save_image(tmp_path / "images" / "a.jpg")
    save_image(tmp_path / folder / "a.png")
    assert "masks without boxes" in named(tmp_path)


def test_images_alone_are_none_of_these(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save_image(tmp_path / split / "a.jpg")
    assert "no annotations of a known format" in named(tmp_path)


def test_a_named_format_is_looked_for_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "meta.json", {"classes": []})
    with pytest.raises(DataError, match="no annotations of a known format"):
        recognise(tmp_path, "coco")
