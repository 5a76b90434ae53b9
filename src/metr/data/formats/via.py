"""VGG Image Annotator 1 and 2: CSV, JSON, or a project file.

Rectangles, polygons, polylines, circles and ellipses are read as the boxes around them; points have no extent. VIA
leaves it to its users which attribute of a region names the category: where there are several, the one called `class`,
`label` or the like is taken, and an issue says so. Regions without any attribute are all of one category, which is
called like the dataset.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from metr.data.formats.base import BoxList, RawImage, Reading, place, plain_name
from metr.data.formats.files import text_start_of, utf_8
from metr.data.formats.json_lines import starts_like
from metr.data.formats.locating import locate
from metr.data.formats.many_images import ManyImagesReader
from metr.data.formats.shapes import around, around_ellipse, around_rectangle
from metr.errors import DataError

_COLUMNS = {"filename", "region_shape_attributes", "region_attributes"}
_SNIFF_BYTES = 1 << 12
# What the attribute that names the category is called, likeliest first.
_CATEGORY_ATTRIBUTES = ("class", "label", "category", "type", "name", "object", "species")
_NO_EXTENT = ("point",)


class _Region(msgspec.Struct):
    shape: dict[str, Any] = msgspec.field(name="shape_attributes", default_factory=dict)
    attributes: dict[str, Any] = msgspec.field(name="region_attributes", default_factory=dict)
    mark: int | str = ""

    def value(self, attribute: str) -> str | None:
        """What an attribute says: a text, or the ticked one of several boxes."""
        value = self.attributes.get(attribute)
        if isinstance(value, dict):
            ticked = [option for option, is_ticked in value.items() if is_ticked is True]
            value = ticked[0] if len(ticked) == 1 else None
        name = plain_name(str(value)) if isinstance(value, str | int | float) else ""
        return name or None


class _Image(msgspec.Struct):
    filename: str
    regions: list[_Region] | dict[str, _Region] = msgspec.field(default_factory=list)
    where: str = ""

    def each_region(self) -> Iterable[_Region]:
        """The regions: version 1 numbers them, version 2 lists them."""
        return self.regions.values() if isinstance(self.regions, dict) else self.regions


class ViaReader(ManyImagesReader):
    """VIA's CSV and JSON. A split is made of files; where a folder has both, JSON is read."""

    format = "via"
    looks_like = "VGG Image Annotator: via_region_data.json, via_project.json or via_export_csv.csv beside the images"
    suffixes = (".json", ".csv")

    def __init__(self, root: Path, splits: Mapping[str, tuple[Path, ...]]) -> None:
        super().__init__(root, splits)
        self._attribute: str | None = None
        self._is_chosen = False

    @property
    def options_used(self) -> tuple[str | None, ...]:
        """The options that the result depends on."""
        return (self.options.boxes, self.options.name)

    @property
    def _own_name(self) -> str:
        """The category of regions without attributes."""
        return self.options.name or self.root.name

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like VIA's CSV or JSON; a cheap look."""
        if path.suffix.lower() == ".csv":
            header = text_start_of(path, _SNIFF_BYTES).decode(errors="replace").partition("\n")[0]
            return set(_header(header)) >= _COLUMNS
        return starts_like(path, b"{", "_via_img_metadata") or starts_like(path, b"{", "filename", "regions", "size")

    @classmethod
    def annotation_files(cls, path: Path) -> Iterator[Path]:
        """The files of a folder and those below it; its JSON files only, where a folder has both: they say the same."""
        files = list(super().annotation_files(path))
        with_json = {file.parent for file in files if file.suffix.lower() == ".json"}
        yield from (file for file in files if file.suffix.lower() == ".json" or file.parent not in with_json)

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split; the attribute that names the category is the same in all splits."""
        if not self._is_chosen:
            paths = sorted({file for files in self.splits.values() for file in files})
            quiet = Reading(files=reading.files)  # what is wrong is noted when a file is read for its images
            regions = [
                region
                for file in paths
                for image in _images(self.within(file), quiet)
                for region in image.each_region()
            ]
            self._attribute, self._is_chosen = _category_attribute(regions, self.within(paths[0]), reading), True
            if regions and self._attribute is None:
                detail = f"regions have no attributes: all are called {self._own_name!r}; `renames` changes it"
                reading.notes.once("no categories", self.within(paths[0]), detail)
        yield from super().read(split, reading)

    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of a file."""
        for image in _images(where, reading):
            path = locate(image.filename, folders, image.where, reading)
            if path is None:
                continue
            boxes = BoxList(image.where, reading)
            for number, region in enumerate(image.each_region(), start=1):
                mark = region.mark or f"region {number}"
                name = self._own_name if self._attribute is None else region.value(self._attribute)
                shape = str(region.shape.get("name"))
                if shape in _NO_EXTENT:
                    boxes.leave_out(name, mark, shape)
                else:
                    boxes.add(name, _box(region.shape), mark, found=f"{shape} with {region.attributes}")
            yield boxes.image(path)


def _category_attribute(regions: list[_Region], where: str, reading: Reading) -> str | None:
    """The attribute that names the category, as far as regions give it a value; None where none has any."""
    counts = Counter(key for region in regions for key in region.attributes if region.value(key) is not None)
    if len(counts) < 2:
        return next(iter(counts), None)
    likely = {name: rank for rank, name in enumerate(_CATEGORY_ATTRIBUTES)}

    def rank(key: str) -> tuple[int, int]:
        words = key.lower().replace("-", "_").split("_")
        return min((likely[word] for word in words if word in likely), default=len(likely)), -counts[key]

    taken = min(sorted(counts), key=rank)
    others = ", ".join(repr(key) for key in sorted(counts) if key != taken)
    reading.notes.once("category attribute", where, f"{taken!r} names the category, not {others}")
    return taken


def _box(shape: Mapping[str, Any]) -> list[float] | None:
    """The corners of the box around a region; None where they cannot be read."""

    def values(*keys: str) -> list[Any]:
        return [shape.get(key) for key in keys]

    match shape.get("name"):
        case "rect":
            return around_rectangle(values("x", "y"), values("width", "height"))
        case "circle":
            return around_ellipse(values("cx", "cy"), values("r", "r"))
        case "ellipse":
            theta = shape.get("theta", 0)  # in radians
            degrees = math.degrees(theta) if isinstance(theta, int | float) else theta
            return around_ellipse(values("cx", "cy"), values("rx", "ry"), degrees)
        case "polygon" | "polyline":
            x, y = values("all_points_x", "all_points_y")
            fits = isinstance(x, list) and isinstance(y, list) and len(x) == len(y)
            return around([list(point) for point in zip(x, y, strict=True)], fewest=2) if fits else None
    return None


def _images(where: str, reading: Reading) -> Iterator[_Image]:
    """The images of a file with their regions.

    Raises:
        DataError: the file cannot be read.
    """
    if where.lower().endswith(".csv"):
        yield from _csv_images(where, reading)
        return
    try:
        data = msgspec.json.decode(utf_8(reading.files.read(where)), type=dict[str, msgspec.Raw])
        if "_via_img_metadata" in data:
            data = msgspec.json.decode(data["_via_img_metadata"], type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise DataError(f"not readable as VIA's JSON: {error}", where=reading.files.root / where) from None
    for key, text in data.items():
        try:
            image = msgspec.json.decode(text, type=_Image)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            reading.issues.add("unreadable annotation", f"{where}, {key}", str(error))
            continue
        image.where = f"{where}, {image.filename}"
        yield image


def _header(line: str) -> list[str]:
    try:
        row = next(csv.reader([line]), [])
    except csv.Error:  # no table: an end of line within a cell, or an endless one
        return []
    return [cell.strip().lstrip("#") for cell in row]


def _csv_images(where: str, reading: Reading) -> Iterator[_Image]:
    """The images of a CSV file, in the order in which they first come up; an image without regions has one line."""
    rows = csv.reader(io.StringIO(reading.text(where), newline=""))
    images: dict[str, _Image] = {}
    broken: set[str] = set()
    try:
        header = _header(",".join(next(rows, [])))
        for row in filter(None, rows):
            at, cells = place(where, rows.line_num), dict(zip(header, row, strict=False))
            name = cells.get("filename", "")
            try:
                shape, attributes = (
                    msgspec.json.decode(cells[f"region_{key}"] or "{}", type=dict[str, Any])
                    for key in ("shape_attributes", "attributes")
                )
            except (KeyError, msgspec.MsgspecError, RecursionError, ValueError) as error:
                reading.issues.add("unreadable annotation", at, f"{error}: {','.join(row)[:80]}; its image is left out")
                broken.add(name)
                continue
            image = images.setdefault(name, _Image(filename=name, regions=[], where=where))
            if shape and isinstance(image.regions, list):
                image.regions.append(_Region(shape=shape, attributes=attributes, mark=rows.line_num))
    except csv.Error as error:
        raise DataError(f"line {rows.line_num}: {error}", where=reading.files.root / where) from None
    yield from (image for name, image in images.items() if name not in broken)
