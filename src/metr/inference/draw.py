"""Boxes on images, and sheets of images, that a person can read.

Images are RGB arrays [h w 3] of bytes; boxes are xyxy in their pixels. Nothing here changes what it is given.
"""

import colorsys
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from metr.data.records import ImageRecord
from metr.errors import MetrError
from metr.inference.config import Labels
from metr.run_directory import explained_disk_errors, replaced_file
from metr.structures import Detections

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

PAPER: Colour = (250, 250, 248)
INK: Colour = (30, 30, 30)
_HUES = 12
_TIERS = ((1.0, 0.9), (0.65, 1.0), (1.0, 0.45), (0.8, 0.7))


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One box to draw: its place, category and score; dashed if it is an ignored crowd."""

    box: Rectangle
    name: str
    score: float | None = None
    dashed: bool = False

    @property
    def area(self) -> float:
        """Square pixels."""
        return _size(self.box)

    @property
    def texts(self) -> tuple[str, ...]:
        """The possible labels of the box, the most informative first."""
        if self.score is None:
            return (legible(self.name),)
        number = f"{self.score:.2f}"
        return f"{legible(self.name)} {number}", number


def detection_marks(detections: Detections, min_score: float = 0.0, limit: int | None = None) -> list[Mark]:
    """The `limit` best detections with at least `min_score`, best first."""
    rows = zip(detections.boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True)
    marks = [Mark(box=tuple(b), name=detections.names[n], score=s) for b, n, s in rows if s >= min_score]
    return marks[:limit]


def record_marks(record: ImageRecord, categories: Sequence[str]) -> list[Mark]:
    """The annotated boxes of an image; crowds are dashed."""
    rows = zip(record.boxes.tolist(), record.labels.tolist(), record.ignore.tolist(), strict=True)
    return [Mark(box=tuple(box), name=categories[label], dashed=ignore) for box, label, ignore in rows]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How boxes are drawn: what their labels say, and the colours of names, by default those of `category_colour`.

    `names`: name and score; `scores`: the score alone; `none`: boxes without labels.
    """

    labels: Labels = "names"
    colours: Mapping[str, Colour] = field(default_factory=dict)

    def colour(self, mark: Mark) -> Colour:
        """The colour of a box and its label."""
        return self.colours.get(mark.name) or category_colour(mark.name)

    def texts(self, mark: Mark) -> tuple[str, ...]:
        """The possible labels of a box, the most informative first."""
        if self.labels == "names":
            return mark.texts
        return mark.texts[1:] if self.labels == "scores" else ()


def draw(
    image: UInt8[np.ndarray, "h w 3"],
    marks: Sequence[Mark],
    longest: int | None = None,
    style: Style | None = None,
) -> np.ndarray:
    """The image with its boxes: large ones below small ones, labels where they cover each other least.

    A label that would cover another label or object shrinks to the score, or is left out: the colour still identifies
    the category, as it is the same everywhere. The best scores choose their places first.

    Args:
        image: RGB.
        marks: The boxes.
        longest: Length in pixels to which the longer side is brought before drawing, so that text stays readable.
        style: Labels and colours.
    """
    style = style or Style()
    scale = 1.0 if longest is None else longest / max(image.shape[:2])
    resized = _resized(image, scale)
    marks = [_scaled(mark, scale) for mark in marks]
    pen = max(1, round(max(resized.size) / 300))
    canvas = ImageDraw.Draw(resized)
    for mark in sorted(marks, key=lambda mark: -mark.area):
        _frame(canvas, mark, pen, style.colour(mark))
    _write_labels(canvas, marks, resized.size, style)
    return np.asarray(resized)


def draw_detections(
    image: UInt8[np.ndarray, "h w 3"],
    detections: Detections,
    min_score: float = 0.3,
    longest: int | None = None,
    style: Style | None = None,
) -> np.ndarray:
    """The image with the detections that have at least `min_score`."""
    return draw(image, detection_marks(detections, min_score), longest, style)


def draw_annotations(
    image: UInt8[np.ndarray, "h w 3"],
    record: ImageRecord,
    categories: Sequence[str],
    longest: int | None = None,
) -> np.ndarray:
    """The image with its annotated boxes; crowds are dashed."""
    return draw(image, record_marks(record, categories), longest)


def side_by_side(
    image: UInt8[np.ndarray, "h w 3"], truth: Sequence[Mark], found: Sequence[Mark], longest: int = 640
) -> np.ndarray:
    """Ground truth at the left, detections at the right, each with its count above."""
    pair = [draw(image, truth, longest), draw(image, found, longest)]
    captions = [f"ground truth ({len(truth)})", f"detections ({len(found)})"]
    return contact_sheet(pair, captions, columns=2, cell=longest)


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str] | None = None, columns: int = 3, cell: int = 480
) -> np.ndarray:
    """Images in rows of `columns`, each with its caption above.

    Args:
        images: RGB arrays of any shape; larger ones are shrunk to `cell` pixels, none is enlarged.
        captions: One line each; what is too long for its cell ends in an ellipsis.
        columns: Images a row.
        cell: Width, and largest height, of an image on the sheet.

    Raises:
        MetrError: there are no images, or not as many captions.
    """
    captions = [""] * len(images) if captions is None else captions
    if not images or len(captions) != len(images):
        raise MetrError(f"a sheet needs images and as many captions, found {len(images)} and {len(captions)}")
    tiles = [_resized(image, min(1.0, cell / max(image.shape[:2]))) for image in images]
    gap, size = 8, max(12, round(cell / 40))
    header = round(size * 1.6) if any(captions) else 0
    columns = min(columns, len(tiles))
    width = max(tile.width for tile in tiles)
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    heights = [max(tiles[i].height for i in row) for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + len(rows) * (gap + header) + gap), PAPER)
    canvas, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = gap + column * (width + gap)
            text = _shortened(legible(captions[index]), size, width)
            canvas.text((left, top), text, fill=INK, font=_font(text, size))
            sheet.paste(tiles[index], (left + (width - tiles[index].width) // 2, top + header))
        top += height + header + gap
    return np.asarray(sheet)


def save_image(image: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """Writes an image in the format that the file name's ending asks for, folders included.

    Raises:
        MetrError: the ending is not that of an image, or the file cannot be written.
    """
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replaced_file(path) as fresh:
            Image.fromarray(image).save(fresh, quality=92)
    except ValueError as error:
        raise MetrError(f"cannot write the image: {error}", where=path, hint="a name ending in .jpg or .png") from None


def category_colour(name: str) -> Colour:
    """A vivid colour that a category name has everywhere, in every process."""
    digest = hashlib.sha256(name.encode()).digest()
    hue = int.from_bytes(digest[:4], "big") / 2**32
    value, saturation = (1.0, 0.85, 0.7)[digest[4] % 3], (0.95, 0.7)[digest[5] % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def palette(names: Sequence[str]) -> dict[str, Colour]:
    """Colours for names of one list that differ as far as possible: hues far apart first, then other brightness."""
    colours = {}
    for row, name in enumerate(dict.fromkeys(names)):
        tier, place = divmod(row, _HUES)
        # strides of five twelfths of the circle put successive names far apart
        hue = (place * 5 % _HUES + 0.5 * (tier % 2)) / _HUES
        value, saturation = _TIERS[tier % len(_TIERS)]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colours[name] = round(red * 255), round(green * 255), round(blue * 255)
    return colours


@lru_cache(maxsize=4096)
def legible(text: str) -> str:
    """The text with every character that no font at hand can draw spelt as its code point, such as `U+732B`."""
    if _is_plain(text):
        return text
    drawable = _coverage(font_file(text))
    return "".join(letter if ord(letter) in drawable or letter == " " else f"U+{ord(letter):04X} " for letter in text)


def _resized(image: np.ndarray, scale: float) -> Image.Image:
    whole = Image.fromarray(image).convert("RGB")
    size = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
    return whole if size == whole.size else whole.resize(size, Image.Resampling.LANCZOS)


def _scaled(mark: Mark, scale: float) -> Mark:
    x0, y0, x1, y1 = (side * scale for side in mark.box)
    return Mark(box=(x0, y0, x1, y1), name=mark.name, score=mark.score, dashed=mark.dashed)


def _frame(canvas: ImageDraw.ImageDraw, mark: Mark, pen: int, colour: Colour) -> None:
    x0, y0, x1, y1 = mark.box
    if not mark.dashed:
        canvas.rectangle((x0, y0, max(x1, x0), max(y1, y0)), outline=colour, width=pen)
        return
    dash = 5 * pen
    for line in ((x0, y0, x1, y0), (x0, y1, x1, y1), (x0, y0, x0, y1), (x1, y0, x1, y1)):
        start, end = np.array(line[:2]), np.array(line[2:])
        steps = max(1, round(float(np.abs(end - start).sum()) / dash))
        points = [start + (end - start) * step / steps for step in range(steps + 1)]
        for a, b in zip(points[::2], points[1::2], strict=False):
            canvas.line((*a, *b), fill=colour, width=pen)


def _write_labels(canvas: ImageDraw.ImageDraw, marks: Sequence[Mark], limits: tuple[int, int], style: Style) -> None:
    """A label for every mark that has room for one, and for the best of each category in any case."""
    size = max(11, round(max(limits) / 50))
    boxes = np.array([mark.box for mark in marks], dtype=np.float64).reshape(-1, 4)
    room = 0.3 * np.array([mark.area for mark in marks])
    placed = np.zeros((0, 4))
    named: set[str] = set()
    for row in sorted(range(len(marks)), key=lambda row: (-(marks[row].score or 0.0), marks[row].area)):
        mark = marks[row]
        own = room.copy()
        own[row] = np.inf  # a label may cover its own box
        texts = style.texts(mark)
        found = _free_place(mark.box, texts, size, limits, placed, boxes, own)
        if found is None and mark.name not in named:
            found = _free_place(mark.box, texts, size, limits, placed, boxes[:0], own[:0])
        if found is None:
            continue
        text, area = found
        colour = style.colour(mark)
        left, top, _, bottom = _text_box(text, size)
        canvas.rectangle(area, fill=colour)
        middle = (area[1] + area[3] - top - bottom) / 2
        canvas.text((area[0] + 2 - left, middle), text, fill=_on(colour), font=_font(text, size))
        placed = np.vstack([placed, area])
        named.add(mark.name)


def _free_place(
    box: Rectangle,
    texts: Sequence[str],
    size: int,
    limits: tuple[int, int],
    placed: Float[np.ndarray, "p 4"],
    boxes: Float[np.ndarray, "m 4"],
    room: Float[np.ndarray, " m"],
) -> tuple[str, Rectangle] | None:
    """The fullest text that has room at a box: clear of `placed` labels, and of most of every other box.

    Of each of `boxes` it covers at most `room` square pixels.
    """
    for text in texts:
        left, _, right, _ = _text_box(text, size)
        width, height = float(right - left + 4), size * 1.25
        areas = _places(box, width, height, limits)
        clear = (_shared(areas, placed) <= 0.1 * width * height).all(1) & (_shared(areas, boxes) <= room).all(1)
        if clear.any():
            x0, y0, x1, y1 = areas[int(clear.argmax())].tolist()
            return text, (x0, y0, x1, y1)
    return None


def _places(box: Rectangle, width: float, height: float, limits: tuple[int, int]) -> Float[np.ndarray, "6 4"]:
    """Places of a label, the usual one first, all inside the image."""
    x0, y0, x1, y1 = box
    wanted = [(x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1), (x0, y1 - height)]
    reach = max(limits[0] - width, 0.0), max(limits[1] - height, 0.0)
    corners = np.clip(np.array(wanted, dtype=np.float64), 0.0, reach)
    return np.concatenate([corners, corners + np.array([width, height])], axis=1)


def _shared(first: Float[np.ndarray, "n 4"], second: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Square pixels that each rectangle has in common with each of the others."""
    least = np.maximum(first[:, None, :2], second[None, :, :2])
    most = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared: np.ndarray = np.maximum(most - least, 0.0).prod(axis=2)
    return shared


def _size(a: Rectangle) -> float:
    """Area of a rectangle; one whose corners are swapped has none."""
    return max(a[2] - a[0], 0.0) * max(a[3] - a[1], 0.0)


def _on(colour: Colour) -> Colour:
    """Black or white, whichever stands out more (luminance of ITU-R BT.601)."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luminance > 140 else (255, 255, 255)


def _shortened(text: str, size: int, width: int) -> str:
    if _font(text, size).getlength(text) <= width:
        return text
    while text and _font(text, size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return _loaded_font(font_file(text), size)


@lru_cache(maxsize=4096)
def _text_box(text: str, size: int) -> Rectangle:
    """Left, top, right and bottom of what a text covers, from where it is drawn."""
    left, top, right, bottom = map(float, _font(text, size).getbbox(text))
    return left, top, right, bottom


@lru_cache(maxsize=64)
def _loaded_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=4096)
def font_file(text: str) -> Path:
    """The font that comes with matplotlib; for letters that it lacks, one of this machine's that has them all."""
    bundled = _bundled_font()
    letters = {ord(letter) for letter in text}
    if _is_plain(text) or letters <= _coverage(bundled):
        return bundled
    from matplotlib.font_manager import fontManager  # imported only if needed: it builds a list of all fonts

    # A font of last resort claims every character and draws none.
    installed = sorted({Path(font.fname) for font in fontManager.ttflist if "lastresort" not in font.fname.lower()})
    return next((path for path in installed if letters <= _coverage(path)), bundled)


def _is_plain(text: str) -> bool:
    """Whether every font has all letters of a text, so that matplotlib (half a second to import) need not be asked."""
    return text.isascii() and text.isprintable()


@lru_cache(maxsize=1)
def _bundled_font() -> Path:
    """DejaVu Sans, which comes with matplotlib. Its folder is found without the import of matplotlib."""
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


@lru_cache(maxsize=512)
def _coverage(path: Path) -> frozenset[int]:
    """The characters that a font file can draw."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
