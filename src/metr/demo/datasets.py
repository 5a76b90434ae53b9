"""Three small datasets of different fields, formats and label spaces, and images that none of them holds."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from metr.demo.formats import COCO, TRAIN, VAL, VOC, YOLO, DemoFormat, DemoImage
from metr.demo.scenes import FIELDS, Field, Scene, draw_scene
from metr.errors import DataError

FORMATS: dict[str, DemoFormat] = {"pond": COCO, "desk": VOC, "meadow": YOLO}
_GUESTS = {"meadow": ("cup", "book"), "desk": ("butterfly", "frog")}
_NOTE = "README.txt"
_MADE = "Drawn by METR's demo; drawn anew each time it runs."

Progress = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """One written dataset. `categories` are the names that it labels; its images know the rest as well."""

    name: str
    folder: Path
    format: str
    categories: tuple[str, ...]
    images: tuple[DemoImage, ...]


def write_demo_datasets(
    folder: Path, seed: int, train: int, val: int, progress: Progress | None = None
) -> tuple[DemoDataset, ...]:
    """Draws the datasets `pond` (COCO JSON), `desk` (Pascal VOC) and `meadow` (YOLO) into subfolders of `folder`.

    `leaf` is labelled in two of them; butterflies over the pond, leaves on the desk, frogs and cups in the meadow are
    not. The same seed draws the same bytes, whatever the counts; what an earlier call has drawn there is replaced.

    Args:
        folder: Where the three subfolders go; made if missing.
        seed: Decides every image.
        train: Training images of each dataset.
        val: Validation images of each dataset.
        progress: Called with the path of every image that is written.

    Raises:
        DataError: a count is below 1 or the seed below 0, a subfolder holds what the demo did not draw, or the
            folder cannot be written.
    """
    _check(seed=(seed, 0), train=(train, 1), val=(val, 1))
    for field in FIELDS:
        _begin(folder / field.name, _told(field))
    return tuple(
        _write_dataset(folder / field.name, index, seed, (train, val), progress) for index, field in enumerate(FIELDS)
    )


def _write_dataset(
    home: Path, index: int, seed: int, counts: tuple[int, int], progress: Progress | None
) -> DemoDataset:
    field, images = FIELDS[index], []
    form = FORMATS[field.name]
    with _writing(home):
        for split, count in zip((TRAIN, VAL), counts, strict=True):
            for number in range(count):
                rng = np.random.default_rng([seed, index, split == VAL, number])
                path = home / form.image_folder(split) / f"{field.name}_{split}_{number:04d}.jpg"
                images.append(_save(draw_scene(field, rng), path, split, rng))
                if progress is not None:
                    progress(path)
        form.annotate(home, images, field.labelled)
    return DemoDataset(name=field.name, folder=home, format=form.name, categories=field.labelled, images=tuple(images))


def write_unseen(folder: Path, seed: int, count: int) -> tuple[DemoImage, ...]:
    """Draws images of all fields that are in no dataset, without annotations, straight into `folder`.

    In the last ones (one in three, at most two) objects of two fields lie together.

    Raises:
        DataError: `count` is below 1 or the seed below 0, the folder holds what the demo did not draw, or it cannot
            be written.
    """
    _check(seed=(seed, 0), count=(count, 1))
    _begin(folder, "Images of all fields, in no dataset, without annotations.")
    mixed = min(2, count // 3)
    images = []
    with _writing(folder):
        for number in range(count):
            together = number >= count - mixed
            field = FIELDS[number - count] if together else FIELDS[number % len(FIELDS)]
            rng = np.random.default_rng([seed, len(FIELDS), number])
            scene = draw_scene(field, rng, guests=_GUESTS[field.name] if together else ())
            name = f"{number + 1:02d}_{field.name}{'_mixed' if together else ''}.jpg"
            images.append(_save(scene, folder / name, "unseen", rng))
    return tuple(images)


def _save(scene: Scene, path: Path, split: str, rng: np.random.Generator) -> DemoImage:
    height, width = scene.image.shape[:2]
    quality = int(rng.integers(82, 96))
    _, encoded = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.tobytes())
    return DemoImage(path=path, split=split, size=(width, height), objects=scene.objects)


def _check(**numbers: tuple[int, int]) -> None:
    for what, (number, least) in numbers.items():
        if number < least:
            raise DataError(f"expected {least} or more, got {number}", where=what)


def _begin(folder: Path, content: str) -> None:
    """An empty folder with a note. What an earlier run has drawn is taken away; anything else is left alone."""
    note = folder / _NOTE
    with _writing(folder):
        if folder.is_dir() and any(folder.iterdir()):
            if not note.is_file() or not note.read_text(encoding="utf-8", errors="replace").startswith(_MADE):
                what = "the demo would draw here, but there are files that it did not draw"
                raise DataError(what, where=folder, hint="another folder")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{_MADE}\n\n{content}\n", encoding="utf-8")


def _told(field: Field) -> str:
    labelled, unlabelled = ", ".join(field.labelled), ", ".join(field.unlabelled)
    return f"Labelled: {labelled}.\nIn the images, but not labelled: {unlabelled}."


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the demo's images cannot be written: {error.strerror or error}"
        raise DataError(what, where=folder, hint="a folder that can be written, with 50 MB free") from error
