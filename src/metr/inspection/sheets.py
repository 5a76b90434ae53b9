"""Contact sheets: some images of a dataset with its annotations drawn, so that a person can check them by eye."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metr.data.datasets_file import DatasetSource
from metr.data.images import read_annotated
from metr.data.records import ImageRecord
from metr.errors import ConfigError, DataError
from metr.inference.draw import Style, contact_sheet, draw, palette, record_marks, save_image
from metr.inspection.facts import DatasetFacts, record_at, spread_places
from metr.writable import check_folder_to_write

# Images of a sheet: at least so many where there are as many, and more only to show further categories.
_FEWEST, _MOST = 12, 48
_COLUMNS = 4
# Longer side of every image on the sheet, in pixels. Smaller images are enlarged, so that their labels can be read.
_LONGEST = 480


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A contact sheet that was written to `path`.

    `missing` are the categories that have boxes, but not in any of the images on the sheet.
    """

    path: Path
    images: int
    missing: tuple[str, ...]


def file_stem(dataset: str) -> str:
    """The name of a dataset as the name of a file or folder."""
    return re.sub(r"[\\/:]+", "_", dataset).lstrip(".") or "dataset"


def check_folder(folder: Path, sources: Sequence[DatasetSource]) -> None:
    """Checks that contact sheets may be written into `folder`.

    Raises:
        ConfigError: it is a file, or lies inside a dataset, whose next reading would find the sheets among its images.
        CheckpointError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"expected a folder, found the file {folder}", where="--draw", hint="name another folder")
    for source in sources:
        if folder.resolve().is_relative_to(source.root.resolve()):
            what = f"the folder {folder} lies inside the dataset {source.name}, among whose images no sheet should be"
            raise ConfigError(what, where="--draw", hint="name a folder outside of the dataset")
    check_folder_to_write(folder, tuple(f"{file_stem(source.name)}.jpg" for source in sources))


def draw_sheet(source: DatasetSource, facts: DatasetFacts, folder: Path) -> Sheet:
    """Draws some images of a dataset with their boxes and names into `folder`; ignored boxes are dashed.

    The images are chosen so that every category is shown once, if 48 images are enough for that. Images that cannot be
    read are passed over.

    Args:
        source: The dataset.
        facts: What was measured of it: the images that show a category are chosen among the measured ones.
        folder: Where the sheet is written, as `NAME.jpg`.

    Raises:
        DataError: not one image can be read.
        MetrError: the sheet cannot be written.
    """
    drawn, captions = [], []
    style = Style(colours=palette(source.categories))
    missing = {label for label, one in enumerate(facts.names.values()) if one.count}
    for split, image, record in _chosen(source, facts, missing):
        drawn.append(draw(image, record_marks(record, source.categories), _LONGEST, style))
        captions.append(f"{split}: {record.path.relative_to(source.root).as_posix()}{_ignored(record)}")
    if not drawn:
        raise DataError("no image can be read, so no contact sheet is drawn", where=source.root)
    path = folder / f"{file_stem(source.name)}.jpg"
    save_image(contact_sheet(drawn, captions, columns=_COLUMNS, cell=_LONGEST), path)
    return Sheet(path=path, images=len(drawn), missing=tuple(source.categories[label] for label in sorted(missing)))


def _chosen(
    source: DatasetSource, facts: DatasetFacts, missing: set[int]
) -> Iterator[tuple[str, np.ndarray, ImageRecord]]:
    """Split, image and record of the images to draw; takes the categories that they show out of `missing`."""
    places = spread_places(source, facts.looked_at)
    shown: dict[int, set[int]] = {number: set() for number in range(len(places))}
    for number, label in facts.shown.tolist():
        shown[number].add(label)
    count = 0
    while shown and count < _MOST:
        number = _next(shown, missing, count)
        if number is None:
            return
        labels = shown.pop(number)
        split, record = record_at(source, int(places[number]))
        try:
            image, fitted, _ = read_annotated(record)
        except DataError:
            continue
        missing -= labels
        count += 1
        yield split, image, fitted


def _next(shown: dict[int, set[int]], missing: set[int], count: int) -> int | None:
    """The image that shows most categories that are missing; then others, evenly spread, until there are enough."""
    best = max(shown, key=lambda number: len(shown[number] & missing))
    if shown[best] & missing:
        return best
    if count >= _FEWEST:
        return None
    numbers = list(shown)
    return numbers[len(numbers) * (2 * count + 1) // (2 * _FEWEST)]


def _ignored(record: ImageRecord) -> str:
    number: int = int(record.ignore.sum())
    return f" ({number} dashed: ignored)" if number else ""
