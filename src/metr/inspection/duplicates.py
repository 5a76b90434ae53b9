"""Image files: unreadable ones, and images that occur in two splits or two datasets."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations, islice
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from metr.data.datasets_file import DatasetSource
from metr.data.formats.base import IssueLog
from metr.data.images import check_image, image_bytes, read_image
from metr.data.records import ImageBytes
from metr.errors import DataError, counted
from metr.inspection.facts import spread

Progress = Callable[[str], None]

# What Roboflow adds to the name of the image that it exports, each augmented copy its own.
_EXPORTED = re.compile(r"[_.](jpe?g|png|bmp|webp)\.rf\.[0-9a-f]{16,}$|\.rf\.[0-9a-f]{16,}$", re.IGNORECASE)
# Bytes from the middle of a file, where images of one camera have nothing in common any more.
_PROBE = 4096
# Side of the thumbnails of images with equal file names, and their least correlation if they show the same.
_THUMBNAIL, _ALIKE = 16, 0.9
# Images between two reports of progress.
_REPORTED = 500


@dataclass(frozen=True, kw_only=True)
class Place:
    """An image of a split; `path` is the file, or its name where `source` has the bytes; messages name `shown`."""

    dataset: str
    split: str
    path: Path
    shown: str
    source: ImageBytes | None = None

    @property
    def group(self) -> tuple[str, str]:
        """Its dataset and split."""
        return self.dataset, self.split


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Images with equal bytes in two datasets: how many there are in these splits, and the first of them."""

    first: Place
    second: Place
    images: int


def check_images(source: DatasetSource, most: int | None, log: IssueLog, progress: Progress) -> int:
    """Adds issues of image files to `log`, and returns how many files were opened.

    Reads the headers of at most `most` images; None decodes every image.
    """
    opened = 0
    whole = sum(len(annotations) for annotations in source.splits.values())
    for _, record in spread(source, whole if most is None else most):
        issue = check_image(record, decode=most is None)
        if issue is not None:
            log.add(issue.kind, issue.where, issue.detail)
        opened += 1
        if opened % _REPORTED == 0:
            progress(f"{source.name}: {counted(opened, 'image')} opened")
    return opened


def places_of(source: DatasetSource) -> tuple[Place, ...]:
    """Every image of a dataset."""
    return tuple(
        Place(dataset=source.name, split=split, path=source.root / path, shown=path, source=bytes_at)
        for split, annotations in source.splits.items()
        for path, bytes_at in zip(annotations.relative_paths(), annotations.sources(), strict=True)
    )


def equal_images(places: Iterable[Place]) -> list[tuple[Place, ...]]:
    """Groups of images with the same bytes that do not all lie in one split of one dataset.

    Files are told apart by their size, then by a few bytes from their middle, and read whole only where both agree.
    """
    groups = [list(places)]
    for sign in (_size, _middle, _whole):
        groups = [kept for group in groups for kept in _divided(group, sign)]
    return [tuple(group) for group in groups]


def equal_names(places: Sequence[Place]) -> list[tuple[Place, Place]]:
    """Images of different splits of one dataset whose files have the same name, exports of one original included.

    File names that are numbers are ignored. Images are compared with the first of their name only.
    """
    first: dict[str, Place] = {}
    pairs = []
    for place in places:
        stem = _EXPORTED.sub("", Path(place.shown).stem).casefold()
        if stem.isdigit():
            continue
        other = first.setdefault(stem, place)
        if other.split != place.split:
            pairs.append((other, place))
    return pairs


def look_alike(first: Place, second: Place) -> bool:
    """Whether two images show the same, perhaps saved anew, scaled, turned or mirrored; False if one is broken."""
    try:
        one, two = _thumbnail(first), _thumbnail(second)
    except DataError:
        return False
    turned = (np.rot90(side, turns) for side in (two, two[:, ::-1]) for turns in range(4))
    return max(float((one * other).sum()) for other in turned) >= _ALIKE


def note_duplicates(
    places: Sequence[Place], equal: Sequence[tuple[Place, ...]], log: IssueLog, most: int | None
) -> None:
    """Adds an issue for each image of a dataset that occurs in several of its splits, by its bytes or file name.

    Equal file names alone mean nothing: cameras and exports number anew. At most `most` pairs with equal names are
    looked at (None: all), and those that show the same are issues.
    """
    known = set()
    for group in equal:
        mine: dict[str, Place] = {}
        for place in (place for place in group if place.dataset == places[0].dataset):
            mine.setdefault(place.split, place)
        for one, two in combinations(mine.values(), 2):
            log.add("same image in two splits", one.shown, f"is in {one.split}; {two.split} has it as {two.shown}")
            known |= {one.path, two.path}
    named = ((one, two) for one, two in equal_names(places) if one.path not in known or two.path not in known)
    for one, two in islice(named, most):
        if look_alike(one, two):
            detail = f"is in {one.split}; {two.split} has it as {two.shown}, saved anew"
            log.add("same image in two splits, saved anew", one.shown, detail)


def overlaps(equal: Sequence[tuple[Place, ...]]) -> tuple[Overlap, ...]:
    """The images that datasets have in common, for each pair of their splits."""
    found: defaultdict[tuple[tuple[str, str], tuple[str, str]], list[tuple[Place, Place]]] = defaultdict(list)
    for group in equal:
        one_each: dict[tuple[str, str], Place] = {}
        for place in group:
            one_each.setdefault(place.group, place)
        for one, two in combinations(one_each.values(), 2):
            if one.dataset != two.dataset:
                found[one.group, two.group].append((one, two))
    return tuple(Overlap(first=pairs[0][0], second=pairs[0][1], images=len(pairs)) for pairs in found.values())


def _divided(group: Iterable[Place], sign: Callable[[Place], object]) -> list[list[Place]]:
    """The parts of a group that share a sign and come from several splits; a file that cannot be read is left out."""
    parts: defaultdict[object, list[Place]] = defaultdict(list)
    for place in group:
        try:
            parts[sign(place)].append(place)
        except OSError:  # missing images are noted where they are opened
            continue
    return [part for part in parts.values() if len({place.group for place in part}) > 1]


@lru_cache(maxsize=1024)
def _thumbnail(place: Place) -> Float[np.ndarray, "s s"]:
    """A small grey image of mean 0 and norm 1, so that products are correlations; zeros for an image of one shade.

    Raises:
        DataError: the image cannot be read.
    """
    grey = (
        Image.fromarray(read_image(place.path, place.source))
        .convert("L")
        .resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    )
    pixels = np.array(grey, dtype=np.float64)
    pixels -= pixels.mean()
    pixels /= max(float(np.linalg.norm(pixels)), 1e-6)
    return pixels


def _size(place: Place) -> int:
    return place.path.stat().st_size if place.source is None else place.source.size


def _middle(place: Place) -> bytes:
    with image_bytes(place.path, place.source) as file:
        file.seek(max(0, _size(place) // 2 - _PROBE // 2))
        return file.read(_PROBE)


def _whole(place: Place) -> bytes:
    digest = blake2b(digest_size=16)
    with image_bytes(place.path, place.source) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()
