"""TFRecord files, written here by the published rules: framing, checksums, messages, and the keys of detection."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reader_trees import NAMES, ExpectedImage, Truth, hidden_beside, made_up, write_text

from metr.data.containers.tf_example import crc32c, parse_example
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.records import ImageRecord
from metr.errors import DataError

Compress = Callable[[bytes], bytes]
POLYNOMIAL = 0x82F63B78


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unpacked"


def opened(path: Path, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=path, **options))


def slow_crc(data: bytes) -> int:
    """CRC-32C bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = slow_crc(data) if len(data) < 64 else crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(records: Sequence[bytes]) -> bytes:
    lengths = [struct.pack("<Q", len(record)) for record in records]
    return b"".join(
        length + masked(length) + record + masked(record) for length, record in zip(lengths, records, strict=True)
    )


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: Sequence[Any] | bytes | str | int, packed: bool = True) -> bytes:
    """A feature: bytes or text, floats, or integers; a single one or a list."""
    values = [values] if isinstance(values, bytes | str | int) else list(values)
    if values and isinstance(values[0], bytes | str):
        return field(1, b"".join(field(1, value.encode() if isinstance(value, str) else value) for value in values))
    if values and isinstance(values[0], float):
        numbers = [struct.pack("<f", value) for value in values]
        return field(2, field(1, b"".join(numbers)) if packed else b"".join(varint(13) + one for one in numbers))
    return field(
        3, field(1, b"".join(map(varint, values))) if packed else b"".join(b"\x08" + varint(v) for v in values)
    )


def example(features: Mapping[str, Any], packed: bool = True) -> bytes:
    entries = (field(1, key.encode()) + field(2, feature(value, packed)) for key, value in features.items())
    return field(1, b"".join(field(1, entry) for entry in entries))


def encoded(item: ExpectedImage) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (item.width, item.height), (127, 127, 127)).save(data, "PNG")
    return data.getvalue()


def detection(item: ExpectedImage) -> dict[str, Any]:
    """The keys of the Object Detection API, as Roboflow writes them."""
    left, top, right, bottom = np.array(item.boxes, dtype=float).reshape(-1, 4).T
    return {
        "image/encoded": encoded(item),
        "image/filename": item.name,
        "image/format": "png",
        "image/height": item.height,
        "image/width": item.width,
        "image/object/bbox/xmin": (left / item.width).tolist(),
        "image/object/bbox/xmax": (right / item.width).tolist(),
        "image/object/bbox/ymin": (top / item.height).tolist(),
        "image/object/bbox/ymax": (bottom / item.height).tolist(),
        "image/object/class/text": list(item.labels),
        "image/object/class/label": [NAMES.index(name) + 1 for name in item.labels],
    }


LABEL_MAP = """# written by hand
item { name: "red cell", id: 1 }
item {
  id: 2
  name: 'white-cell'
}
item { id: 3 display_name: "\\320\\277\\321\\217\\321\\202\\320\\275\\320\\276" name: "/m/3" }
"""


def write(path: Path, records: Sequence[Mapping[str, Any]], compress: Compress = bytes, packed: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(framed([example(record, packed) for record in records])))
    return path


def roboflow(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write(root / split / "cells.tfrecord", list(map(detection, images)))
        write_text(root / split / "cells_label_map.pbtxt", LABEL_MAP)


def numbers_alone(root: Path, truth: Truth) -> None:
    """Sharded, without texts, names in the one label map."""
    for split, images in truth.items():
        rows = [{key: value for key, value in detection(item).items() if not key.endswith("text")} for item in images]
        write(root / f"{split}.record-00000-of-00002", rows[:2])
        write(root / f"{split}.record-00001-of-00002", rows[2:])
    write_text(root / "label_map.pbtxt", LABEL_MAP)


def zipped(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write(root / f"{split}.tfrecord.gz", list(map(detection, images)), gzip.compress)


def deflated(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write(root / f"{split}.tfrec", list(map(detection, images)), zlib.compress)


def one_by_one(root: Path, truth: Truth) -> None:
    """Numbers that are not packed."""
    for split, images in truth.items():
        write(root / f"{split}.tfrecords", list(map(detection, images)), packed=False)


def in_pixels(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        rows = []
        for item in images:
            sides = zip(("xmin", "ymin", "xmax", "ymax"), np.array(item.boxes, float).reshape(-1, 4).T, strict=True)
            boxes = {f"image/object/bbox/{side}": column.tolist() for side, column in sides}
            rows.append(detection(item) | boxes)
        write(root / f"{split}.tfrecord", rows)


def tfds(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        rows = []
        for item in images:
            sides = np.array(item.boxes, float).reshape(-1, 4) / [item.width, item.height, item.width, item.height]
            rows.append(
                {
                    "image": encoded(item),
                    "image/filename": item.name,
                    "objects/bbox": sides[:, [1, 0, 3, 2]].reshape(-1).tolist(),
                    "objects/label": [NAMES.index(name) for name in item.labels],
                }
            )
        write(root / f"cells-{split}.tfrecord-00000-of-00001", rows)
    write_text(root / "objects-label.labels.txt", "\n".join(NAMES))


LAYOUTS = {one.__name__: one for one in (roboflow, numbers_alone, zipped, deflated, one_by_one, in_pixels, tfds)}


def told(record: ImageRecord, source: DatasetSource) -> tuple[int, int, list[tuple[tuple[int, ...], str]]]:
    boxes = [tuple(round(float(side)) for side in box) for box in record.boxes]
    labels = [source.categories[label] for label in record.labels]
    return record.width, record.height, sorted(zip(boxes, labels, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seed", "hidden"), [(0, False), (1, False), (0, True)])
def test_every_layout_gives_back_what_was_written(tmp_path: Path, layout: str, seed: int, hidden: bool) -> None:
    truth = made_up(seed)
    LAYOUTS[layout](tmp_path / "my data", truth)
    if hidden:
        hidden_beside(tmp_path / "my data")
    source = opened(tmp_path / "my data")
    assert source.format == "tfrecord"
    assert source.issues == ()
    assert set(source.categories) == set(NAMES)
    for split, images in truth.items():
        expected = [(item.width, item.height, sorted(zip(item.boxes, item.labels, strict=True))) for item in images]
        assert [told(record, source) for record in source.split(split)] == expected
        for record, item in zip(source.split(split), images, strict=True):
            assert record.path.read_bytes() == encoded(item)


def test_checksums() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    rng = np.random.default_rng(0)
    for length in (0, 1, 3, 4, 1023, 1024, 1025, 4096, 5000, 8191):
        data = rng.bytes(length)
        assert crc32c(data) == slow_crc(data), length


def test_a_message_of_every_kind() -> None:
    data = example({"bytes": [b"\0a", b""], "floats": [0.5, -2.0], "integers": [1, -1, 1 << 62], "none": []})
    assert parse_example(data + b"\x50\x01" + varint(17 << 3 | 5) + b"abcd") == {
        "bytes": [b"\0a", b""],
        "floats": [0.5, -2.0],
        "integers": [1, -1, 1 << 62],
        "none": [],
    }
    for cut in range(1, len(data)):
        with pytest.raises(ValueError):
            parse_example(data[:cut])


def test_crowds_and_difficult_objects_are_ignored(tmp_path: Path) -> None:
    item = ExpectedImage("a.png", 40, 30, ((1, 1, 9, 9), (2, 2, 9, 9), (3, 3, 9, 9)), (NAMES[0],) * 3)
    flags = {"image/object/is_crowd": [0, 1, 0], "image/object/difficult": [0, 0, 1]}
    write(tmp_path / "data" / "train.tfrecord", [detection(item) | flags, detection(item)])
    source = opened(tmp_path / "data")
    found = sorted(tuple(record.ignore.tolist()) for split in source.splits.values() for record in split)
    assert found == [(False, False, False), (False, True, True)]


def test_what_is_wrong_in_a_record_points_to_it(tmp_path: Path) -> None:
    good = detection(ExpectedImage("a.png", 40, 30, ((1, 1, 9, 9),), (NAMES[0],)))
    without = {key: value for key, value in good.items() if "object" not in key}
    rows = [
        good,
        good | {"image/object/bbox/ymax": [0.5, 0.6]},
        without,
        {key: value for key, value in good.items() if key not in {"image/encoded", "image/filename"}},
        {key: value for key, value in good.items() if key != "image/encoded"},
        good | {"image/object/class/text": [""], "image/object/class/label": []},
        good | {"image/object/bbox/xmin": [float("nan")]},
        good | {"image/object/class/text": [], "image/object/class/label": [9]},
    ]
    write(tmp_path / "data" / "train" / "x.tfrecord", rows)
    source = opened(tmp_path / "data")
    assert source.issue_counts == {
        "unreadable annotation": 2,
        "unannotated image": 1,
        "missing image": 1,
        "unknown category": 1,
        "unreadable box": 1,
    }
    assert [issue.where.partition(",")[0] for issue in source.issues if issue.kind == "unreadable annotation"] == [
        "train/x.tfrecord/records.jsonl:2",
        "train/x.tfrecord/records.jsonl:4",
    ]
    assert set(source.categories) == {NAMES[0], "category 9"}


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zlib.compress])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_file_that_is_cut_off(tmp_path: Path, compress: Compress, share: float, cache: Path) -> None:
    items = made_up()["train"]
    path = write(tmp_path / "data" / "train.tfrecord", list(map(detection, items)), compress)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"damaged or cut off at record") as caught:
        opened(tmp_path / "data")
    assert caught.value.where == path
    assert not list(cache.glob("*/.building*"))


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "train.tfrecord", list(map(detection, made_up()["train"][:2])))
    whole = path.read_bytes()
    for place in range(13, len(whole), 37):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged or cut off at record"):
            opened(tmp_path / "data")


def test_records_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.tfrecord").write_bytes(framed([b"no message"]))
    with pytest.raises(DataError, match=r"record 1 is no tf\.train\.Example"):
        opened(tmp_path / "data")
    write(tmp_path / "data" / "train.tfrecord", [{"image/encoded": b"x", "image/class/label": 1}])
    with pytest.raises(DataError, match="no annotations of a known format"):
        opened(tmp_path / "data")


def test_missing_files_and_one_file(tmp_path: Path) -> None:
    numbers_alone(tmp_path / "data", made_up())
    (tmp_path / "data/train.record-00000-of-00002").unlink()
    (issue,) = opened(tmp_path / "data").issues
    assert (issue.kind, issue.where) == ("missing file", "train.record")
    alone = opened(tmp_path / "data/train.record-00001-of-00002")
    assert sum(map(len, alone.splits.values())) == 3
    assert set(alone.categories) == set(NAMES)


def test_a_changed_label_map_counts(tmp_path: Path) -> None:
    numbers_alone(tmp_path / "data", made_up())
    assert NAMES[0] in opened(tmp_path / "data").categories
    write_text(tmp_path / "data/label_map.pbtxt", LABEL_MAP.replace("red cell", "erythrocyte"))
    assert "erythrocyte" in opened(tmp_path / "data").categories


def test_unused_names_of_the_label_map_are_categories(tmp_path: Path) -> None:
    item = ExpectedImage("a.png", 40, 30, ((1, 1, 9, 9),), (NAMES[0],))
    write(tmp_path / "data" / "train.tfrecord", [detection(item), detection(item)])
    write_text(tmp_path / "data/map.pbtxt", LABEL_MAP)
    assert set(opened(tmp_path / "data").categories) == set(NAMES)
