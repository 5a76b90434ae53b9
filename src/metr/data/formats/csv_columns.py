"""How a CSV file of boxes is written: its encoding, its delimiter, and what stands in its columns."""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from metr.data.formats.base import whole_size
from metr.data.formats.box_kinds import BoxKind
from metr.data.formats.files import encoding_of, is_image, start_of

_SNIFF_BYTES = 1 << 14
# Lines that tell what the columns of a file without a header are.
_SAMPLED = 20
_DELIMITERS = ",;\t|"
# The line by which Excel is told the delimiter.
_EXCEL = re.compile(r'"?sep=(.)', re.IGNORECASE)

# What columns are called, in lower case, without spaces and marks between words. The likeliest name comes first.
_ALIASES = {
    "path": (
        *("filename", "filepath", "imagepath", "path", "image", "file", "imageid", "img", "imagename", "imgname"),
        *("imagefile", "imagefilename", "imgpath", "imgfile", "imgfilename", "imgid", "imageurl", "url", "frame"),
    ),
    "name": (
        *("class", "label", "classname", "labelname", "category", "name", "categoryname", "classlabel", "objectclass"),
        *("objectname", "objectlabel", "object", "tag", "species", "classid", "labelid", "categoryid"),
    ),
    "group": ("isgroupof", "iscrowd", "crowd"),
    "split": ("split", "set", "subset", "partition", "usage", "phase"),
}
_SIZES = (("imagewidth", "imageheight"), ("imgwidth", "imgheight"), ("imagew", "imageh"), ("width", "height"))
_STARTS = (("xmin", "ymin"), ("x1", "y1"), ("left", "top"), ("xtl", "ytl"), ("minx", "miny"), ("x0", "y0"), ("x", "y"))
_ENDS = (("xmax", "ymax"), ("x2", "y2"), ("right", "bottom"), ("xbr", "ybr"), ("maxx", "maxy"), ("x1", "y1"))
_CENTRES = (
    ("xcenter", "ycenter"),
    ("centerx", "centery"),
    ("xcentre", "ycentre"),
    ("centrex", "centrey"),
    ("cx", "cy"),
)
_EXTENTS = (
    *(("w", "h"), ("bboxw", "bboxh"), ("bboxwidth", "bboxheight"), ("boxw", "boxh"), ("boxwidth", "boxheight")),
    ("width", "height"),
)
_CELLS = ("bbox", "box", "boundingbox", "bndbox")
_NUMBERS = ("a", "b", "c", "d")
# What the columns are in files without a header; blank ones may hold anything.
_LAYOUTS = (
    ("path", *_NUMBERS, "name"),
    ("path", *_NUMBERS, "name", "width", "height"),
    ("path", "name", *_NUMBERS),
    ("path", "name", *_NUMBERS, "width", "height"),
    ("path", "width", "height", "name", *_NUMBERS),
    ("split", "path", "name", "a", "b", "", "", "c", "d", "", ""),  # Google's AutoML
)
_MEANINGS = {
    "path": "the image (filename, image_path, image_id)",
    "box": "the box (xmin, ymin, xmax, ymax; x, y, width, height; or bbox)",
}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a file is written.

    `columns` says where "path", "name", "split", "group", "width" and "height" stand, those that there are, and either
    the four numbers "a" to "d" of a box or its one cell "box". `skipped` lines come before those of boxes; `others` are
    the columns of the header that are not read.
    """

    delimiter: str
    columns: Mapping[str, int]
    boxes: BoxKind
    skipped: int = 0
    others: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """The number of cells that a line must have."""
        return 1 + max(place for name, place in self.columns.items() if name in {"path", "name", "box", *_NUMBERS})

    def lines(self, text: str) -> Iterator[tuple[int, list[str]]]:
        """The lines that are not blank, without the header, with their numbers.

        Raises:
            csv.Error: a cell does not end; its message has the number of the line.
        """
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter)
        try:
            for row in islice((row for row in rows if any(row)), self.skipped, None):
                yield rows.line_num, row
        except csv.Error as error:
            raise csv.Error(f"line {rows.line_num}: {error}") from None

    def cell(self, row: Sequence[str], name: str) -> str:
        """What a line has in a column; "" where it has none."""
        place = self.columns.get(name, len(row))
        return row[place].strip() if place < len(row) else ""

    def box(self, row: Sequence[str]) -> list[str]:
        """The numbers of a box, as they are written; none where the line has none, which says that nothing is there."""
        if "box" not in self.columns:
            cells = [self.cell(row, name) for name in _NUMBERS]
        else:
            text = self.cell(row, "box")
            cells = re.split(r"[\s,;]+", text.strip("[](){} \t\r\n")) if text.lower() not in {"nan", "none"} else []
        return [self._decimal(cell) for cell in cells] if any(cells) else []

    def size(self, row: Sequence[str]) -> tuple[int, int] | None:
        """(height, width) where a line gives them."""
        values = finite([self.cell(row, name) for name in ("height", "width")])
        return None if values is None else whole_size(values[0], values[1])

    def _decimal(self, cell: str) -> str:
        return cell if self.delimiter == "," else cell.replace(",", ".")


def dialect_of(path: Path) -> Dialect | None:
    """How a CSV file is written, from its first lines; None if it holds no boxes."""
    delimiter, skipped, rows = _first_rows(path)
    if not rows:
        return None
    return _with_header(rows[0], delimiter, skipped) or _without_header(rows, delimiter, skipped)


def header_faults(path: Path) -> str | None:
    """Which columns of boxes a CSV file lacks, for a message; None where nothing in its header is known."""
    _, _, rows = _first_rows(path)
    found = _columns(rows[0]) if rows else {}
    has = {"path": "path" in found, "box": bool(found.keys() & {"a", "box"})}
    missing = [meaning for name, meaning in _MEANINGS.items() if not has[name]]
    if not missing or not any(has.values()):
        return None
    listed = ", ".join(cell.strip() for cell in rows[0][:12])
    return f"has the columns {listed}; missing: {' and '.join(missing)}"


def finite(cells: Sequence[str]) -> list[float] | None:
    """The cells as finite numbers; None if any is not one."""
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def _first_rows(path: Path) -> tuple[str, int, list[list[str]]]:
    """The delimiter, how many lines come before the first row, and the first rows, the last of which may be cut."""
    start = start_of(path, _SNIFF_BYTES)
    encoding = encoding_of(start)
    text = start.decode(encoding if encoding.startswith("utf-16") else "utf-8-sig", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    excel = _EXCEL.match(lines[0]) if lines else None
    lines = lines[1:] if excel else lines
    if not lines:
        return ",", 0, []
    delimiter = excel[1] if excel else max(_DELIMITERS, key=lines[0].count)
    whole = lines[:-1] if len(start) == _SNIFF_BYTES and len(lines) > 1 else lines
    try:
        rows = list(islice(csv.reader(whole, delimiter=delimiter), _SAMPLED))
    except csv.Error:
        rows = list(csv.reader(whole[:1], delimiter=delimiter))
    return delimiter, int(excel is not None), rows


def _with_header(row: Sequence[str], delimiter: str, skipped: int) -> Dialect | None:
    columns = _columns(row)
    if "path" not in columns or not columns.keys() & {"a", "box"}:
        return None
    kind = columns.pop("kind", None)
    boxes: BoxKind = "xywh" if kind is None else ("xyxy", "xywh", "cxcywh")[kind]
    others = tuple(cell.strip() for place, cell in enumerate(row) if place not in columns.values())
    return Dialect(delimiter=delimiter, columns=columns, boxes=boxes, skipped=skipped + 1, others=others)


def _columns(row: Sequence[str]) -> dict[str, int]:
    """Where the columns stand that a header names; "kind" is 0 for corners, 1 for x, y, w, h, 2 for centres."""
    words = [re.sub(r"[^a-z0-9]+", "", cell.lower()) for cell in row]
    places = {word: place for place, word in reversed(list(enumerate(words)))}
    for place, word in enumerate(words):
        short = re.sub(r"^(boundingbox|bndbox|bbox|box)(?=.)", "", word)
        places.setdefault(short, place)
    columns = {
        name: next(places[alias] for alias in aliases if alias in places)
        for name, aliases in _ALIASES.items()
        if any(alias in places for alias in aliases)
    }
    if "path" not in columns and "name" in places and columns.get("name") != places["name"]:
        columns["path"] = places["name"]
    pairs = (
        (kind, start, end)
        for kind, starts, ends in ((0, _STARTS, _ENDS), (2, _CENTRES, _EXTENTS), (1, _STARTS, _EXTENTS))
        for start in starts
        for end in ends
        if start != end
    )
    for kind, start, end in pairs:
        found = [places[word] for word in (*start, *end) if word in places]
        if len(set(found)) == len(_NUMBERS):
            columns |= dict(zip(_NUMBERS, found, strict=True)) | {"kind": kind}
            break
    else:
        columns |= next(({"box": places[word]} for word in _CELLS if word in places), {})
    for size in _SIZES:
        if all(word in places and places[word] not in columns.values() for word in size):
            columns |= {"width": places[size[0]], "height": places[size[1]]}
            break
    return columns


def _without_header(rows: Sequence[Sequence[str]], delimiter: str, skipped: int) -> Dialect | None:
    fits = {layout: [row for row in rows if _fits(row, layout)] for layout in _LAYOUTS if _fits(rows[0], layout)}
    # A name that is a number may be a corner as well: the layout whose names are none is likelier.
    scores = {layout: (len(own), sum(_is_named(row, layout) for row in own)) for layout, own in fits.items()}
    fitting = [layout for layout in scores if scores[layout] == max(scores.values())]
    if not fitting or (len(fitting) > 1 and len(fitting[0]) > len(_LAYOUTS[0])):
        return None
    columns = {name: place for place, name in enumerate(fitting[0]) if name}
    return Dialect(delimiter=delimiter, columns=columns, boxes="xyxy", skipped=skipped)


def _fits(row: Sequence[str], layout: Sequence[str]) -> bool:
    """Whether a line may be of a layout: an image, numbers where they belong, or none of them."""
    cells = dict(zip(layout, map(str.strip, row), strict=False))
    if len(row) != len(layout) or not is_image(cells["path"]):
        return False
    box = [cells[name] for name in _NUMBERS]
    sizes = [cells[name] for name in ("width", "height") if cells.get(name)]
    empty = not any(box) and not cells["name"]
    return (empty or finite([cell.replace(",", ".") for cell in box]) is not None) and finite(sizes) is not None


def _is_named(row: Sequence[str], layout: Sequence[str]) -> bool:
    name = row[layout.index("name")].strip()
    return finite([name]) is None
