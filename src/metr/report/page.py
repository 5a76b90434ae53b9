"""One HTML file that needs no network: the template, what it may say, and images inside it."""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import metr
from metr.errors import MetrError, counted, shown
from metr.run_directory import explained_disk_errors, replaced_file

LIMIT = 10_000_000
"""Bytes that a page stays under."""
_HERE = Path(__file__).parent
_LONGEST = 160  # characters of a name that a page says
_SCRIPT_END = re.compile(r"</", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image inside the page: its data URI, and width and height in pixels."""

    uri: str
    width: int
    height: int


def write_page(path: Path, title: str, values: Mapping[str, Any]) -> Path:
    """Writes the page and gives its path.

    Args:
        path: The HTML file; its folder is made.
        title: Of the page.
        values: What the template is given: `evaluation`, `run`, or both.

    Raises:
        CheckpointError: the disk refuses.
        MetrError: the page would be too large.
    """
    given = {"evaluation": None, "run": None, **values}
    text = _environment().get_template("page.html.jinja").render(title=title, version=metr.__version__, **given)
    content = text.encode("utf-8", "backslashreplace")
    if len(content) >= LIMIT:
        what = f"the page would have {len(content) / 1e6:.1f} MB, over the {LIMIT / 1e6:.0f} MB that pages stay under"
        raise MetrError(what, where=path, hint="evaluate fewer datasets at a time")
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as fresh:
        fresh.write_bytes(content)
    return path


def said(text: str, longest: int = _LONGEST) -> str:
    """A text from elsewhere as the page says it: in one line, without control characters, at most so long."""
    line = " ".join(shown(str(text)).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def picture(image: UInt8[np.ndarray, "h w 3"], longest: int, most: int) -> Picture:
    """An RGB image as a JPEG inside the page.

    Args:
        image: Bytes.
        longest: Pixels that its longer side has at most.
        most: Bytes that the JPEG has at most: quality goes down first, then the size.
    """
    whole = Image.fromarray(image).convert("RGB")
    whole.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    quality = 84
    while True:
        held = io.BytesIO()
        whole.save(held, "JPEG", quality=quality, optimize=True)
        if held.tell() <= most or max(whole.size) < 64:
            break
        if quality > 60:
            quality -= 12
        else:
            whole.thumbnail((whole.width * 3 // 4, whole.height * 3 // 4), Image.Resampling.LANCZOS)
    uri = "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()
    return Picture(uri=uri, width=whole.width, height=whole.height)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"said": said, "number": _number, "percent": _percent, "size": _size}
    environment.globals |= {"inline": _inline, "counted": counted}
    environment.globals |= {"sections": _sections, "worst_data": _worst_data, "presence_data": _presence_data}
    return environment


def _inline(name: str) -> Markup:
    """A style sheet or script of this package, which holds nothing from elsewhere."""
    text = (_HERE / name).read_text(encoding="utf-8")
    if _SCRIPT_END.search(text):
        raise MetrError("must not hold </", where=_HERE / name)
    return Markup(text)


def _number(value: int | float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: int | float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _size(value: int | float) -> str:
    return f"{value:.1f}"


def _sections(evaluation: Any, run: Any) -> list[tuple[str, str]]:
    """Anchor and words of each section that the page has."""
    found: list[tuple[str, str, object]] = []
    if run is not None:
        found += [("changes", "Before and after", run.changes), ("training", "Training", True)]
        found += [("data", "Data", run.data), ("examples", "Examples", run.sheets)]
        found += [("environment", "Environment", True)]
    if evaluation is not None:
        data = evaluation.datasets
        diagnosed = any(one.diagnosis for one in data)
        found += [("datasets", "Datasets", True), ("arms", "Compared", evaluation.arms)]
        found += [("worst", "Worst images", evaluation.worst), ("names", "Names", True)]
        found += [("curves", "Precision and recall", any(one.curves for one in data))]
        found += [("errors", "Kinds of error", diagnosed), ("confusion", "Confusion", diagnosed)]
        found += [("sizes", "Object size", True), ("calibration", "Calibration", any(one.calibration for one in data))]
        found += [("presence", "Presence", any(one.presence for one in data))]
    return [(anchor, words) for anchor, words, there in found if there]


def _worst_data(images: Any) -> list[dict[str, Any]]:
    """What the script knows of the worst images; their pixels are in the thumbnails."""
    return [
        {
            "dataset": said(image.dataset),
            "name": image.name,
            "w": image.picture.width,
            "h": image.picture.height,
            "truth": [asdict(box) for box in image.truth],
            "found": [asdict(box) for box in image.found],
            "remarks": image.remarks,
        }
        for image in images
    ]


def _presence_data(datasets: Any) -> list[dict[str, Any]]:
    """What the script knows of the heat maps."""
    maps = [one.presence for one in datasets if one.presence is not None]
    keys = ("rows", "columns", "cells", "there", "cell", "left", "width")
    return [{key: getattr(one, key) for key in keys} for one in maps]
