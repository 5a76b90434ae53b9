"""A dataset of the size and shape of Objects365, as COCO JSON: what `index.py` builds its index from.

Numbers are drawn from a seed; no image has pixels. Reading finds images by name only, so a folder's first image
is an empty file and the others are hard links to it: a million names that take hardly any inodes.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jaxtyping import Float, Int

IMAGES, BOXES, NAMES, FOLDERS = 1_700_000, 25_000_000, 365, 51
# The share of annotations that stand anywhere in the file, not beside the others of their image.
SCATTERED = 0.2
CROWDS, FAKES, DEGENERATE = 0.015, 0.005, 1e-4
# (height, width) in pixels.
SIZES = ((512, 769), (683, 1024), (768, 1024), (1024, 683), (375, 500), (1080, 1920))
# Rows that are formatted at a time. Each block has another number of decimals, 2 to 6.
BLOCK = 20_000

_FACTS = "source.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was written: `degenerate` of the `boxes` have no width."""

    root: Path
    scale: float
    seed: int
    images: int
    boxes: int
    degenerate: int
    json_bytes: int
    links: str
    seconds: float

    @property
    def annotations(self) -> Path:
        """The COCO file."""
        return annotation_file(self.root)

    def facts(self) -> dict[str, Any]:
        """What is told of it in a result."""
        return {name: value for name, value in asdict(self).items() if name != "root"} | {"scattered": SCATTERED}


@dataclass(frozen=True, kw_only=True)
class _Images:
    """The images, in the order of the file: `ids` grow, with gaps; `folders` and `sizes` are numbers."""

    ids: Int[np.ndarray, "n"]
    folders: Int[np.ndarray, "n"]
    sizes: Int[np.ndarray, "n"]

    def names(self) -> Iterator[str]:
        """The file names as Objects365 has them: of the directories, only the last is there."""
        for folder, number in zip(self.folders.tolist(), self.ids.tolist(), strict=True):
            yield f"images/v1/patch{folder}/objects365_v1_{number:08d}.jpg"


def annotation_file(root: Path) -> Path:
    """The COCO file in a dataset's folder."""
    return root / "annotations" / "instances_train.json"


def write_source(root: Path, *, scale: float, seed: int, links: bool = True) -> Source:
    """Writes the dataset, or finds it where the same has been written before.

    Args:
        root: The dataset's folder.
        scale: The size, relative to Objects365.
        seed: Decides every number.
        links: Whether the images' names are to be there as well.
    """
    facts = root / _FACTS
    if facts.is_file():
        found = Source(**json.loads(facts.read_text(encoding="utf-8")) | {"root": root})
        if (found.scale, found.seed, found.links != "none") == (scale, seed, links):
            return found
    began, rng = time.perf_counter(), np.random.default_rng(seed)
    images = _made_images(rng, max(1, round(IMAGES * scale)))
    path, boxes = annotation_file(root), max(1, round(BOXES * scale))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        degenerate = _write_json(file, rng, images, boxes)
    source = Source(
        root=root,
        scale=scale,
        seed=seed,
        images=len(images.ids),
        boxes=boxes,
        degenerate=degenerate,
        json_bytes=path.stat().st_size,
        links=_link_images(root / "train", images.names()) if links else "none",
        seconds=time.perf_counter() - began,
    )
    facts.write_text(json.dumps(asdict(source) | {"root": str(root)}), encoding="utf-8")
    return source


def _made_images(rng: np.random.Generator, count: int) -> _Images:
    return _Images(
        ids=np.cumsum(rng.integers(1, 3, count)),
        folders=np.arange(count) * FOLDERS // count,
        sizes=rng.integers(len(SIZES), size=count),
    )


def _write_json(file: TextIO, rng: np.random.Generator, images: _Images, boxes: int) -> int:
    """Writes the file from the first brace to the last, and counts the boxes without a width."""
    file.write('{"info": {"description": "made up", "version": "2.0"}, "licenses": [{"id": 5, "name": "none"}], ')
    file.write('"images": [')
    sizes = np.array(SIZES)[images.sizes]
    image = '{"height": %d, "id": %d, "license": 5, "width": %d, "file_name": "%s", "url": ""}'
    columns = (sizes[:, 0].tolist(), images.ids.tolist(), sizes[:, 1].tolist(), images.names())
    _write_rows(file, image, zip(*columns, strict=True))
    file.write('], "annotations": [')
    degenerate = _write_annotations(file, rng, images, boxes)
    categories = [{"id": number, "name": f"thing number {number}"} for number in range(1, NAMES + 1)]
    file.write(f'], "categories": {json.dumps(categories)}}}')
    return degenerate


def _write_annotations(file: TextIO, rng: np.random.Generator, images: _Images, count: int) -> int:
    owners, labels = _owners(rng, len(images.ids), count), _labels(rng, count)
    degenerate = 0
    for number, start in enumerate(range(0, count, BLOCK)):
        mine, decimals = owners[start : start + BLOCK], 2 + number % 5
        boxes = _made_boxes(rng, np.array(SIZES, dtype=np.float64)[images.sizes[mine]])
        degenerate += int((boxes[:, 2] == 0).sum())
        crowds, fakes = ((rng.random(len(mine)) < share).astype(int) for share in (CROWDS, FAKES))
        number_format = f"%.{decimals}f"
        row = (
            f'{{"id": %d, "iscrowd": %d, "isfake": %d, "area": {number_format}, "isreflected": 0, '
            f'"bbox": [{", ".join([number_format] * 4)}], "image_id": %d, "category_id": %d}}'
        )
        ids = range(start + 1, start + len(mine) + 1)
        areas = boxes[:, 2] * boxes[:, 3]
        columns = [crowds, fakes, areas, *boxes.T, images.ids[mine], labels[start : start + BLOCK]]
        file.write(", " if start else "")
        _write_rows(file, row, zip(ids, *(column.tolist() for column in columns), strict=True))
    return degenerate


def _owners(rng: np.random.Generator, images: int, count: int) -> Int[np.ndarray, "n"]:
    """The image of each box. Some images are crowded, some have none; a share of the boxes is out of order."""
    edges = np.cumsum(rng.gamma(1.2, size=images))
    owners: Int[np.ndarray, "n"] = np.searchsorted(edges, np.sort(rng.random(count)) * edges[-1]).astype(np.int32)
    scattered = rng.random(count) < SCATTERED
    owners[scattered] = rng.permutation(owners[scattered])
    return owners


def _labels(rng: np.random.Generator, count: int) -> Int[np.ndarray, "n"]:
    """Category ids: a few are frequent, most are rare."""
    edges = np.cumsum(1 / np.arange(1, NAMES + 1))
    labels: Int[np.ndarray, "n"] = np.searchsorted(edges, rng.random(count) * edges[-1]) + 1
    return labels.astype(np.int16)


def _made_boxes(rng: np.random.Generator, sizes: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 4"]:
    """xywh in pixels, inside the images."""
    limits = sizes[:, ::-1]
    sides = np.clip(rng.lognormal(-2, 0.9, (len(sizes), 2)) * limits, 2, limits)
    boxes = np.concatenate([rng.random((len(sizes), 2)) * (limits - sides), sides], axis=1)
    boxes[rng.random(len(boxes)) < DEGENERATE, 2] = 0
    return boxes


def _write_rows(file: TextIO, row: str, values: Iterator[tuple[object, ...]]) -> None:
    """Rows with ", " between them, never all at once."""
    separator = ""
    while block := [row % each for each in islice(values, BLOCK)]:
        file.write(separator + ", ".join(block))
        separator = ", "


def _link_images(folder: Path, names: Iterator[str]) -> str:
    """Puts the names in place, and says how."""
    empty: dict[Path, Path] = {}
    count = files = 0
    for count, name in enumerate(names, start=1):  # noqa: B007
        path = folder / "/".join(name.split("/")[-2:])
        if path.parent not in empty:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(empty[path.parent], path)
        except (KeyError, OSError):  # the first of its folder, or no more links are allowed
            path.touch()
            empty[path.parent] = path
            files += 1
    return f"{count} names, hard links to {files} empty files in {len(empty)} folders"
