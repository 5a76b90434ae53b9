"""Which format a folder is read as, and the message where none fits."""

from pathlib import Path

import pytest
from reader_trees import coco_plain, csv_header, csv_plain, made_up, save_image, voc_beside, write_text, yolo_plain

from metr.data.formats.registry import READERS, other_formats, recognise
from metr.errors import DataError


def test_precedence(tmp_path: Path) -> None:
    """COCO, YOLO, VOC, CSV: what declares its categories comes first."""
    truth = made_up()
    expected: list[str] = []
    for name, write in (("csv", csv_header), ("voc", voc_beside), ("yolo", yolo_plain), ("coco", coco_plain)):
        write(tmp_path, truth)
        reader = recognise(tmp_path)
        assert reader.format == name
        assert other_formats(reader, tmp_path) == expected
        expected.insert(0, name)
    assert [reader.format for reader in READERS if reader.format in expected] == expected


def test_a_named_format_is_taken(tmp_path: Path) -> None:
    for write in (csv_header, voc_beside, yolo_plain, coco_plain):
        write(tmp_path, made_up())
    for format_name in ("coco", "yolo", "voc", "csv"):
        assert recognise(tmp_path, format_name).format == format_name


def test_nothing_is_recognised(tmp_path: Path) -> None:
    save_image(tmp_path / "one.jpg")
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "notes.md", "hello")
    with pytest.raises(DataError) as caught:
        recognise(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "found 1 folder (folder), 1 image, 1 other file" in message
    for word in ("COCO", "YOLO", "Pascal VOC", "CSV", "data.yaml", "ImageSets/Main"):
        assert word in message
    with pytest.raises(DataError) as caught:
        recognise(tmp_path, "voc")
    assert "COCO" not in str(caught.value)


def test_an_empty_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder is empty"):
        recognise(tmp_path)
    with pytest.raises(DataError, match="a single file"):
        recognise(save_image(tmp_path / "one.jpg"))


def test_a_misspelt_path(tmp_path: Path) -> None:
    csv_plain(tmp_path / "playing_cards", made_up())
    with pytest.raises(DataError, match=r"did you mean 'playing_cards'\?"):
        recognise(tmp_path / "playing_card")
    with pytest.raises(DataError, match="check the path"):
        recognise(tmp_path / "nowhere" / "near")
    with pytest.raises(DataError, match="did you mean 'coco'"):
        recognise(tmp_path / "playing_cards", "cocos")
