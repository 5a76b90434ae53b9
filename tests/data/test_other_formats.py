"""A folder that fits several formats: whether they read the same is said, whenever it is opened, and how to choose."""

import logging
from pathlib import Path

import pytest
from reader_trees import csv_header, made_up, voc_beside

from metr.data import other_formats
from metr.data.datasets_file import DatasetConfig, open_dataset, parse_data_arguments


def said(caplog: pytest.LogCaptureFixture, root: Path, **options: object) -> list[tuple[int, str]]:
    """Level and text of what opening a dataset says of other formats."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_dataset(DatasetConfig.checked({"name": "made", "path": root, **options}), root.parent / "cache")
    return [(one.levelno, one.getMessage()) for one in caplog.records if "also fits" in one.getMessage()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the same data twice: Pascal VOC and CSV."""
    for write in (csv_header, voc_beside):
        write(tmp_path / "data", made_up())
    return tmp_path / "data"


def test_the_same_data_twice_is_said_every_time(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = said(caplog, root)
    assert said(caplog, root) == first, "metr train says what metr inspect said before"
    ((level, text),) = first
    assert level == logging.INFO
    assert f"{root}: read as voc; it also fits csv, which reads the same" in text
    (line,) = [part for part in text.split("`") if part.startswith("datasets:")]
    file = root.parent / "chosen.yaml"
    file.write_text(line)
    (chosen,) = parse_data_arguments([str(file)])
    assert open_dataset(chosen, root.parent / "cache").format == "csv"


def test_other_data_is_a_warning_with_numbers(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (test,) = root.rglob("*test*.csv")
    test.unlink()
    ((level, text),) = said(caplog, root)
    assert level == logging.WARNING
    assert "it also fits csv, which reads other data (images: train 5, val 3; " in text
    assert ", not images: train 5, val 3, test 2; " in text


def test_a_reading_that_fails_is_no_alternative(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in root.rglob("*.csv"):
        head = file.read_text(encoding="utf-8").splitlines()[0]
        file.write_text(head + "\nnowhere.jpg,40,30,cat,1,1,9,9\n", encoding="utf-8")
    ((level, text),) = said(caplog, root)
    assert level == logging.INFO
    assert "csv, which cannot be read (" in text


def test_a_large_dataset_is_not_read_twice(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_formats, "_COMPARED", 9)
    ((level, text),) = said(caplog, root)
    assert level == logging.WARNING
    assert "csv (not compared, as it has more than 9 images)" in text


def test_who_names_the_format_hears_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("voc", "csv"):
        assert said(caplog, root, format=name) == []
