"""Boxes in lines of text: YOLO and CSV."""

import csv
import io
import json
import posixpath
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from metr.bounded_yaml import parse_yaml, yaml_fault
from metr.data.appending.base import Addition, Appending, CannotAppendError, names_of, read_text, write_text
from metr.data.formats.base import plain_name
from metr.data.formats.box_kinds import Written
from metr.data.formats.csv_boxes import CsvReader
from metr.data.formats.csv_columns import Dialect, dialect_of
from metr.data.formats.written import WrittenBox, rounded
from metr.data.formats.yolo import YoloReader


def append_to_yolo(work: Appending) -> None:
    """Adds lines, and the names that are new."""
    if not isinstance(work.reader, YoloReader) or not work.reader.description.is_relative_to(work.reader.root):
        raise CannotAppendError("its names are declared outside of its folder")
    numbers = {plain_name(name): number for number, name in work.reader.names.items()}
    fresh = [name for name in names_of(work.additions) if name not in numbers]
    names = dict(work.reader.names) | dict(enumerate(fresh, start=max(work.reader.names, default=-1) + 1))
    numbers = {plain_name(name): number for number, name in names.items()}
    description = work.root / work.reader.within(work.reader.description)
    if description.suffix.lower() in {".yaml", ".yml"}:
        _declare_in_yaml(description, work.root, names)
    elif sorted(names) == list(range(len(names))):
        text, encoding = read_text(description)
        ends = "" if not text or text.endswith("\n") else "\n"
        write_text(description, text, encoding, [(len(text), ends + "".join(f"{name}\n" for name in fresh))])
    files = {path: where for path, where in work.images.items() if where.endswith(".txt")}
    folders = {posixpath.dirname(path): posixpath.dirname(where) for path, where in files.items()}
    for one in work.additions:
        where = one.where if one.where.endswith(".txt") else _label_file(one.path, folders)
        path = work.root / where
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        between = b"" if not before or before.endswith(b"\n") else b"\n"
        lines = "".join(_yolo_line(numbers[box.name], box, one.size) for box in one.boxes)
        path.write_bytes(before + between + lines.encode())


def _label_file(image: str, folders: Mapping[str, str]) -> str:
    """Where the text file of an image goes that has none: where those of others of its folder are."""
    folder, name = posixpath.split(image)
    if folder not in folders:
        raise CannotAppendError(f"no text file lies where that of {image} would be")
    return posixpath.join(folders[folder], posixpath.splitext(name)[0] + ".txt")


def _yolo_line(number: int, box: WrittenBox, size: tuple[int, int]) -> str:
    (height, width), (left, top, right, bottom) = size, box.box
    values = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height)
    return f"{number} " + " ".join(f"{value:.8f}" for value in values) + "\n"


def _declare_in_yaml(description: Path, root: Path, names: Mapping[int, str]) -> None:
    """Puts the names into a `data.yaml`, their number, and its folder where that was named by its place on the disk."""
    text, encoding = read_text(description)
    try:
        node: Any = parse_yaml(text.removeprefix("\ufeff"))
    except yaml.YAMLError as error:
        raise CannotAppendError(f"{description.name} is no YAML: {yaml_fault(error)}") from None
    shift = len(text) - len(text.removeprefix("\ufeff"))
    in_order = sorted(names) == list(range(len(names)))
    said = [json.dumps(names[number], ensure_ascii=False) for number in sorted(names)]
    pairs = [f"{number}: {name}" for number, name in zip(sorted(names), said, strict=True)]
    new = {"names": f"[{', '.join(said)}]" if in_order else f"{{{', '.join(pairs)}}}", "nc": str(len(names))}
    parts: list[str] = []
    start = 0
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        begin, end = value.start_mark.index + shift, value.end_mark.index + shift
        if key.value == "path" and Path(value.value).is_absolute():
            said_path = posixpath.relpath(root.as_posix(), description.parent.as_posix())
        elif key.value in new:
            said_path = new[key.value]
        else:
            continue
        body = text[begin:end]
        kept = body[len(body.rstrip()) :]  # a block ends where the next key begins
        on_own_line = "\n" in text[key.end_mark.index + shift : begin]
        begin = text.index(":", key.end_mark.index + shift) + 1 if on_own_line else begin
        parts += [text[start:begin], " " if on_own_line else "", said_path, kept]
        start = end
    write_text(description, "".join([*parts, text[start:]]), encoding)


def append_to_csv(work: Appending) -> None:
    """Adds lines at the end of each file."""
    if not isinstance(work.reader, CsvReader):
        raise CannotAppendError("not read as CSV")
    found: dict[str, list[Addition]] = defaultdict(list)
    for one in work.additions:
        found[one.where].append(one)
    for file, listed in found.items():
        text, encoding = read_text(work.root / file)
        dialect = dialect_of(work.root / file)
        if dialect is None or "name" not in dialect.columns:
            raise CannotAppendError(f"{file} has no column of categories")
        rows = [row for _, row in dialect.lines(text.removeprefix("\ufeff"))]
        kind = work.reader.written.get(file, Written(kind=dialect.boxes)).kind
        out = io.StringIO(newline="")
        ends = "\r\n" if "\r\n" in text else "\n"
        writer = csv.writer(out, delimiter=dialect.delimiter, lineterminator=ends)
        owners = _owners(rows, dialect)
        for one in listed:
            like = _row_of(one.path, owners, dialect)
            writer.writerows(_csv_row(like, box, dialect, kind, one.size) for box in one.boxes)
        missing = "" if text.endswith(("\n", "\r")) else ends
        write_text(work.root / file, text, encoding, [(len(text), missing + out.getvalue())])


def _owners(rows: Sequence[Sequence[str]], dialect: Dialect) -> Mapping[str, list[Sequence[str]]]:
    """The rows by the name of the file of their image, which may lack its suffix."""
    owners: dict[str, list[Sequence[str]]] = defaultdict(list)
    for row in rows:
        owners[posixpath.basename(dialect.cell(row, "path").replace("\\", "/"))].append(row)
    return owners


def _row_of(path: str, owners: Mapping[str, list[Sequence[str]]], dialect: Dialect) -> Sequence[str]:
    """The row of an image whose name shares the longest end with its path."""
    name = posixpath.basename(path)
    rows = owners.get(name) or owners.get(posixpath.splitext(name)[0]) or []
    if not rows:
        raise CannotAppendError(f"no line names {path}")
    whole, without = path.split("/"), posixpath.splitext(path)[0].split("/")

    def shared(row: Sequence[str]) -> int:
        named = dialect.cell(row, "path").replace("\\", "/").split("/")
        return max(_common_end(named, parts) for parts in (whole, without))

    return max(rows, key=shared)


def _common_end(one: Sequence[str], two: Sequence[str]) -> int:
    pairs = zip(reversed(one), reversed(two), strict=False)
    return next((n for n, (first, second) in enumerate(pairs) if first != second), min(len(one), len(two)))


def _csv_row(like: Sequence[str], box: WrittenBox, dialect: Dialect, kind: str, size: tuple[int, int]) -> list[str]:
    """A line of a box for the image of the line `like`, from which the image, its size and its split are taken."""
    kept = {dialect.columns[name] for name in ("path", "split", "width", "height") if name in dialect.columns}
    row = [cell if place in kept else "" for place, cell in enumerate(like)]
    row += [""] * (max(dialect.columns.values()) + 1 - len(row))
    row[dialect.columns["name"]] = box.name
    if "group" in dialect.columns:
        row[dialect.columns["group"]] = "0"
    left, top, right, bottom = box.box
    corners = {
        "xyxy": (left, top, right, bottom),
        "xywh": (left, top, right - left, bottom - top),
        "cxcywh": ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top),
    }[kind.rstrip("n%")]
    height, width = size
    scale = {"n": 1, "%": 100}.get(kind[-1])
    sides = (width, height) * 2
    values = corners if scale is None else tuple(v * scale / side for v, side in zip(corners, sides, strict=True))
    said = [str(rounded(value)) if scale is None else f"{value:.8f}" for value in values]
    if "box" in dialect.columns:
        row[dialect.columns["box"]] = f"[{', '.join(said)}]"
    for column, value in zip("abcd", said, strict=True):
        if column in dialect.columns:
            row[dialect.columns[column]] = value
    return row
