"""Damaged datasets end in records, issues or one clear message, never in a traceback."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
from line_trees import LINE_LAYOUTS
from reader_trees import LAYOUTS, made_up, write_text

from metr.data.datasets_file import DatasetConfig, open_dataset
from metr.data.images import read_annotated
from metr.errors import MetrError

ODD_VALUES = (b"null", b"1e999", b"-1", b"NaN", b"9" * 30, b'"x"', b"[]", b"{}", b"", b"true", b"\0", b"[" * 5000)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes cut off, overwritten, grown, with a hole, or with another value in place of a number."""
    if not data:
        return b"?"
    first, last = sorted(int(place) for place in rng.integers(0, len(data) + 1, 2))
    noise = rng.integers(0, 256, int(rng.integers(1, 30)), dtype=np.uint8).tobytes()
    numbers = list(re.finditer(rb"[0-9.]+", data)) or [re.match(b"", data)]
    number = numbers[int(rng.integers(len(numbers)))]
    value = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
    assert number is not None
    options = (
        data[:first],
        data[:first] + noise + data[first + len(noise) :],
        data[:first] + noise + data[first:],
        data[:first] + data[last:],
        data[: number.start()] + value + data[number.end() :],
    )
    return options[int(rng.integers(len(options)))]


@pytest.mark.parametrize("layout", LAYOUTS | LINE_LAYOUTS)
def test_damaged_annotations(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "data"
    (LAYOUTS | LINE_LAYOUTS)[layout][1](root, made_up())
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() != ".jpg")
    rng = np.random.default_rng(0)
    for round_number in range(8):
        path = files[int(rng.integers(len(files)))]
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        with contextlib.suppress(MetrError):
            source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / f"cache {round_number}")
            for record in (record for annotations in source.splits.values() for record in annotations):
                sides = record.boxes[:, 2:] - record.boxes[:, :2]
                assert (sides > 0.99).all()
                assert record.labels.max(initial=0) < len(source.categories)
                assert read_annotated(record)[0].ndim == 3
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b/c.jpg", "a/" * 3000, "~nobody/x", "."])
def test_odd_paths_are_missing_images(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    LAYOUTS["csv plain"][1](root, made_up())
    write_text(root / "val.csv", f'images/val 00 снимок.jpg,1,2,9,9,cat\n"{name}.jpg",1,2,9,9,cat')
    source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")
    assert source.issue_counts == {"missing image": 1}


@pytest.mark.parametrize("name", ["x" * 300, "a" * 3000 + ".yaml", "~nobody/x"])
def test_odd_paths_of_datasets(name: str) -> None:
    with pytest.raises(MetrError, match="no such dataset"):
        open_dataset(DatasetConfig(name="made", path=Path(name)))
