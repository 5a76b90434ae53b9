"""Label Studio: a JSON list of tasks ("JSON"), or of annotations ("JSON-MIN").

Rectangles (also turned ones), ellipses, polygons and brush masks are read as the boxes around them; key points have no
extent. Predictions and annotations that were cancelled are left out. An image of a task that has no others is left
out, too: nobody has said that it has no objects. Of several annotations the one marked as ground truth is taken, else
the first, and an issue says so.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np

from metr.data.formats.base import BoxList, RawImage, Reading, whole_size
from metr.data.formats.files import OutsideError, is_image
from metr.data.formats.json_lines import json_items, numbers, starts_like
from metr.data.formats.locating import locate
from metr.data.formats.many_images import ManyImagesReader
from metr.data.formats.shapes import around, around_ellipse, around_rectangle
from metr.data.formats.written import WrittenBox, WrittenImage, xml_text

# Brush masks of larger images are not decoded: they take four bytes a value and four values a pixel.
_LARGEST_MASK = 1 << 28
_GEOMETRIES = ("rectangle", "polygon", "ellipse", "brush", "keypoint")
# What Label Studio puts before the names of uploaded files.
_UPLOADED = re.compile(r"[0-9a-f]{8}-")
# What the control and the image are called in written files, as in Label Studio's own templates.
_LABELS, _IMAGE = "label", "image"


class _Annotation(msgspec.Struct):
    result: list[dict[str, Any]] = msgspec.field(default_factory=list)
    was_cancelled: bool | None = False
    ground_truth: bool | None = False


class LabelStudioReader(ManyImagesReader):
    """Label Studio's JSON and JSON-MIN. A split is made of files."""

    format = "label_studio"
    looks_like = "Label Studio: its JSON or JSON-MIN export beside a folder with the images"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like Label Studio's JSON; a cheap look."""
        geometries = "|".join(_GEOMETRIES[:-1])
        return starts_like(path, b"[", "data", "annotations|completions") or starts_like(
            path, b"[", f"({geometries})labels"
        )

    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of a file, in the order of its tasks."""
        for place, task in json_items(where, msgspec.json.Decoder(dict[str, Any]), reading):
            data = task["data"] if isinstance(task.get("data"), dict) else task
            name = _image_name(data)
            path = _find(name, folders, place, reading)
            if path is None:
                continue
            result = _result(task, place, reading)
            if result is None:
                reading.issues.add("unannotated image", path, f"{place} has no submitted annotation: left out")
            else:
                yield _image(result, path, place, reading)


def _image_name(data: Mapping[str, Any]) -> str:
    """The address of the image of a task: under `image`, else what looks like one."""
    texts = [data.get("image"), *data.values()]
    names = [value for value in texts if isinstance(value, str)]
    return next((name for name in names if is_image(_plain_path(name))), names[0] if names else "")


def _plain_path(address: str) -> str:
    """The path of an image in an address: of a local file, an upload or the web."""
    try:
        parts = urlsplit(address)
        local = parse_qs(parts.query).get("d") if parts.path.endswith("local-files/") else None
    except ValueError:
        return address
    if local:
        return local[0].lstrip("/")
    if len(parts.scheme) > 1 and parts.netloc:
        return unquote(parts.path).lstrip("/")
    return unquote(address) if address.startswith("/data/") else address


def _find(name: str, folders: Sequence[str], where: str, reading: Reading) -> str | None:
    """The image of a task, also where it lies there without what Label Studio puts before uploads."""
    plain = _plain_path(name).replace("\\", "/")
    base = posixpath.basename(plain)
    own = [base, _UPLOADED.sub("", base, count=1)] if _UPLOADED.match(base) else []  # no two uploads share a name
    for option in (plain, *own):
        try:
            found = reading.files.find(option, folders) if option else None
        except OutsideError:
            continue
        if found is not None:
            return found
    return locate(name, folders, where, reading)


def _result(task: Mapping[str, Any], place: str, reading: Reading) -> list[dict[str, Any]] | None:
    """What an annotator found in the image of a task; None where nobody has looked."""
    listed = task.get("annotations", task.get("completions"))
    if listed is None and "data" not in task:
        return _minimal_result(task)
    try:
        annotations = msgspec.convert(listed or [], list[_Annotation])
    except msgspec.ValidationError as error:
        reading.issues.add("unreadable annotation", place, str(error))
        return None
    submitted = [annotation for annotation in annotations if not annotation.was_cancelled]
    chosen = next((annotation for annotation in submitted if annotation.ground_truth), None)
    if len(submitted) > 1:
        which = "the one marked as ground truth" if chosen else "the first"
        detail = f"{len(submitted)} annotations of one image: {which} is read"
        reading.issues.add("several annotators", place, detail)
    chosen = chosen or next(iter(submitted), None)
    return None if chosen is None else chosen.result


def _minimal_result(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The regions of a row of JSON-MIN, which lists them by the name of their control, in the form of the full JSON."""
    lists = [
        value for value in row.values() if isinstance(value, list) and all(isinstance(item, dict) for item in value)
    ]
    regions = [item for items in lists for item in items]
    if not regions and "annotation_id" not in row:
        return None
    kinds = [next((key for key in item if key.endswith("labels")), "") for item in regions]
    return [{"type": kind, "value": item, **item} for kind, item in zip(kinds, regions, strict=True)]


def _image(result: Sequence[Mapping[str, Any]], path: str, place: str, reading: Reading) -> RawImage:
    """The image with the regions of an annotation. A region may have its shape and its label in items of one id."""
    size = next((size for item in result if (size := _size(item)) is not None), None)
    labelled = {item.get("id") for item in result if _labels(item)}
    boxes = BoxList(place, reading)
    for number, item in enumerate(result, start=1):
        kind, labels, value = str(item.get("type")), _labels(item), item.get("value")
        is_shape = kind in _GEOMETRIES and item.get("id") not in labelled
        if not isinstance(value, dict) or not (labels or is_shape):
            continue  # an answer about the image or a region, or a shape whose label is another item
        for label in labels or [""]:
            mark = f"region {number}"
            if value.keys() & {"points", "rle", "radiusX", "height"}:
                boxes.add(label, _box(value, size), mark, found=f"a {kind} without a label")
            else:
                boxes.leave_out(label, mark, "key point")
    return boxes.image(path, size=size, relative=size is None)


def _labels(item: Mapping[str, Any]) -> list[str]:
    """The labels of a region; none where the item is something else."""
    kind, value = str(item.get("type")), item.get("value")
    labels = value.get(kind) if kind.endswith("labels") and isinstance(value, dict) else None
    return [str(label) for label in labels] if isinstance(labels, list) else []


def _size(item: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the image in pixels, as a region gives them."""
    sides = numbers([item.get("original_height"), item.get("original_width")], 2)
    return None if sides is None else whole_size(*sides)


def _box(value: Mapping[str, Any], size: tuple[int, int] | None) -> list[float] | None:
    """The corners of the box around a region; None where they cannot be read.

    Args:
        value: The region, in per cent of the image.
        size: (height, width) of the image in pixels; where it is None, corners are fractions of the image.
    """
    height, width = size or (1, 1)
    scale = [width / 100, height / 100]
    degrees = value.get("rotation") or 0
    if "rle" in value:
        return None if size is None else _around_mask(value["rle"], height, width)
    if "points" in value:
        points = value["points"] if isinstance(value["points"], list) else []
        return around([_scaled(point, scale) for point in points])
    if degrees and size is None:
        return None  # a turned shape needs the sides of the image
    pair = ("radiusX", "radiusY") if "radiusX" in value else ("width", "height")
    place, sides = _scaled([value.get("x"), value.get("y")], scale), _scaled([value.get(key) for key in pair], scale)
    if place is None or sides is None:
        return None
    return (around_ellipse if "radiusX" in value else around_rectangle)(place, sides, degrees)


def _scaled(point: Any, scale: Sequence[float]) -> list[float] | None:
    known = numbers(point, 2)
    return None if known is None else [value * factor for value, factor in zip(known, scale, strict=True)]


def _around_mask(code: Any, height: int, width: int) -> list[float] | None:
    """The corners of the box around a brush mask; None where it cannot be read, or is empty.

    A mask is an RGBA image, of which the last channel counts, as a string of bits: how many values (32 bits); the
    length of a value less 1 (5 bits); four lengths of counters less 1 (4 bits each). Then come packets: whether one
    value is repeated (1 bit), which length the counter has (2 bits), the counter less 1, and the value or values.
    """
    count = 4 * height * width
    try:
        bits = "".join(f"{byte:08b}" for byte in bytes(code))
        header = [
            int(bits[start:end], 2) for start, end in ((0, 32), (32, 37), *((at, at + 4) for at in (37, 41, 45, 49)))
        ]
        if header[0] != count or count > _LARGEST_MASK:
            return None
        word, lengths, at, done = header[1] + 1, [length + 1 for length in header[2:]], 53, 0
        values = np.zeros(count, dtype=np.uint32)
        while done < count:
            counter = lengths[int(bits[at + 1 : at + 3], 2)]
            end = done + 1 + int(bits[at + 3 : at + 3 + counter], 2)
            is_repeated, at = bits[at] == "1", at + 3 + counter
            for place in range(done, done + 1 if is_repeated else end):
                values[place : end if is_repeated else place + 1] = int(bits[at : at + word], 2)
                at += word
            done = end
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    rows, columns = np.nonzero(values.reshape(height, width, 4)[..., 3])
    if not len(rows):
        return None
    return [float(value) for value in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def label_studio_task(image: WrittenImage, number: int, model_version: str | None = None) -> dict[str, Any]:
    """A task of an image that lies where Label Studio's storage of local files serves it.

    Args:
        image: The image with its boxes; its name is its path below the folder that is served.
        number: The number of the task.
        model_version: What found the boxes, which are then predictions; None: they are an annotation.
    """
    task: dict[str, Any] = {"id": number, "data": {"image": f"/data/local-files/?d={quote(image.name)}"}}
    regions = [
        label_studio_region(box, (image.height, image.width), f"{number}-{place}")
        for place, box in enumerate(image.boxes, start=1)
    ]
    if model_version is None:
        return task | {"annotations": [{"result": regions}]}
    scores = [box.score for box in image.boxes if box.score is not None]
    mean = round(sum(scores) / len(scores), 5) if scores else 0.0
    return task | {"predictions": [{"model_version": model_version, "score": mean, "result": regions}]}


def label_studio_region(
    box: WrittenBox, size: tuple[int, int], region_id: str, names: tuple[str, str] = (_LABELS, _IMAGE)
) -> dict[str, Any]:
    """A rectangle in per cent of an image of `size` (height, width); one of a detector has its score.

    `names` are those of the control and of the image in the labelling configuration.
    """
    height, width = size
    left, top, right, bottom = box.box
    region: dict[str, Any] = {
        "id": region_id,
        "type": "rectanglelabels",
        "from_name": names[0],
        "to_name": names[1],
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {
            "x": 100 * left / width,
            "y": 100 * top / height,
            "width": 100 * (right - left) / width,
            "height": 100 * (bottom - top) / height,
            "rotation": 0,
            "rectanglelabels": [box.name],
        },
    }
    return region if box.score is None else {**region, "origin": "prediction", "score": round(box.score, 5)}


def label_studio_config(categories: Sequence[str]) -> str:
    """The labelling configuration of a project for such tasks."""
    labels = "".join(f"    <Label value={quoteattr(xml_text(name))}/>\n" for name in categories)
    return (
        f'<View>\n  <Image name="{_IMAGE}" value="$image"/>\n'
        f'  <RectangleLabels name="{_LABELS}" toName="{_IMAGE}">\n{labels}  </RectangleLabels>\n</View>\n'
    )
