"""Hugging Face's tables for tests: rows with images inside, as a repository of the hub has them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from reader_trees import NAMES, ExpectedImage, Truth, write_text

Row = dict[str, Any]


def encoded(item: ExpectedImage, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (item.width, item.height), (127, 127, 127)).save(data, kind)
    return data.getvalue()


def xywh(box: Sequence[int]) -> list[float]:
    left, top, right, bottom = box
    return [float(left), float(top), float(right - left), float(bottom - top)]


def row(item: ExpectedImage, key: str = "category", *, words: bool = False) -> Row:
    numbers = [name if words else NAMES.index(name) for name in item.labels]
    objects = {"bbox": [xywh(box) for box in item.boxes], key: numbers}
    return {
        "image_id": 7,
        "image": {"bytes": encoded(item), "path": item.name},
        "width": item.width,
        "height": item.height,
        "objects": objects,
    }


def schema(kind: pa.DataType, key: str = "category", metadata: Mapping[str, str] | None = None) -> pa.Schema:
    boxes = pa.list_(pa.list_(pa.float64()))
    return pa.schema(
        [
            ("image_id", pa.int64()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("width", pa.int64()),
            ("height", pa.int64()),
            ("objects", pa.struct([("bbox", boxes), (key, pa.list_(kind))])),
        ],
        metadata=metadata,
    )


def features(key: str = "category") -> dict[str, Any]:
    label = {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "List"}
    return {"image": {"_type": "Image"}, "objects": {key: label, "bbox": {"_type": "List"}}}


def save(path: Path, rows: Sequence[Row], kind: pa.Schema) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), kind)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, kind) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


CARD = """---
license: cc0-1.0
dataset_info:
  features:
  - name: image
    dtype: image
  - name: objects
    sequence:
    - name: bbox
      sequence: float32
      length: 4
    - name: category
      dtype:
        class_label:
          names:
            '0': red cell
            '1': white-cell
            '2': пятно
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/val-*
  - split: test
    path: [data/test-*]
---
"""


def repository(root: Path, truth: Truth) -> None:
    """Shards in `data`, names in the card."""
    for split, images in truth.items():
        for number, part in enumerate((images[:1], images[1:])):
            save(root / "data" / f"{split}-0000{number}-of-00002.parquet", list(map(row, part)), schema(pa.int64()))
    write_text(root / "README.md", CARD)
