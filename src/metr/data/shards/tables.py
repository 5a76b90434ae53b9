"""Hugging Face's tables as packs: the bytes of the images one after the other, and the rows beside them.

What the columns are is settled as for tables on this disk (`metr.data.containers.huggingface`).
"""

import io
from pathlib import Path
from typing import Any

import msgspec

from metr.data.containers.features import Columns, class_labels
from metr.data.containers.huggingface import annotated_columns, objects_of_row, table_rows, with_names
from metr.data.containers.store import Budget
from metr.data.images import header_of
from metr.errors import DataError

TABLES = (".parquet", ".arrow")


class Row(msgspec.Struct, omit_defaults=True):
    """An image of a shard: its range of bytes, and what is said of it, in the keys of imagefolder.

    `height` and `width` are those that the boxes are meant in. `trouble` is why the row is left out: a kind of issue,
    and what was found.
    """

    file_name: str
    offset: int = 0
    size: int = 0
    height: float | None = None
    width: float | None = None
    objects: Any = None
    image_id: int | str | None = None
    exhaustive: list[str] | None = None
    trouble: tuple[str, str] | None = None


def unpack_table(table: Path, pack: io.BufferedWriter, rows: io.BufferedWriter, about: Path, budget: Budget) -> None:
    """Writes the images of a table into a pack, and a line for each row.

    Args:
        table: A Parquet or Arrow file.
        pack: Takes the images.
        rows: Takes a `Row` as JSON for each row of the table.
        about: The folder with the files that tell of the dataset, such as its card.
        budget: Counts what is written.

    Raises:
        DamagedShardError: the table is damaged, or has no images with boxes.
        DataError: the disk is nearly full.
    """
    schema, columns = annotated_columns(table)
    labels = class_labels(schema, about, about, columns)
    for number, values in enumerate(table_rows(table, columns), start=1):
        row = _row(values, columns, number, pack, budget)
        row.objects = with_names(objects_of_row(values, columns), labels)
        line = msgspec.json.encode(row, enc_hook=str) + b"\n"
        budget.add_bytes(len(line))
        rows.write(line)


def _row(values: dict[str, Any], columns: Columns, number: int, pack: io.BufferedWriter, budget: Budget) -> Row:
    """The image of a row, written into the pack."""
    image = values[columns.image]
    data = image.get("bytes") if isinstance(image, dict) else image
    name = image.get("path") if isinstance(image, dict) else None
    row = Row(file_name=f"{number:06d}")
    if not isinstance(data, bytes) or not data:
        told = f"row {number} has no image" if not name and not isinstance(data, str) else f"{name or data}"
        row.trouble = "missing image", f"{told}: shards must have the images inside"
        return row
    row.offset, row.size = pack.tell(), len(data)
    budget.add_bytes(len(data))
    pack.write(data)
    sizes = {key: values.get(key) for key in columns.sizes}
    row.height, row.width = sizes.get("height"), sizes.get("width")
    measure(row, data)
    return row


def measure(row: Row, data: bytes) -> None:
    """Completes the name of a row by the kind of its image, and its size where it has none."""
    try:
        kind, header = header_of(data, row.file_name)
    except DataError as error:
        row.trouble = "unreadable image", error.what
        return
    if "." not in row.file_name:
        row.file_name += "." + {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}.get(kind, kind.lower())
    if not row.height or not row.width:
        row.height, row.width = header.shown_size
