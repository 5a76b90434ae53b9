"""Three small datasets of different fields, formats and label spaces, and pictures that none of them holds."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from metr.demo.formats import COCO, TRAIN, VAL, VOC, YOLO, DemoFormat, DemoPicture
from metr.demo.scenes import FIELDS, Field, Scene, draw_scene
from metr.errors import DataError

FORMATS: dict[str, DemoFormat] = {"pond": COCO, "desk": VOC, "meadow": YOLO}
_GUESTS = {"meadow": ("cup", "book"), "desk": ("butterfly", "frog")}
_MARKER = "README.txt"
_MADE = "Drawn by METR's demo; drawn anew each time it runs."

Progress = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """One written dataset. `categories` are the names that it labels; its pictures know the rest as well."""

    name: str
    folder: Path
    format: str
    categories: tuple[str, ...]
    pictures: tuple[DemoPicture, ...]


def write_demo_datasets(
    folder: Path, seed: int, train: int, val: int, progress: Progress | None = None
) -> tuple[DemoDataset, ...]:
    """Draws the datasets `pond` (COCO JSON), `desk` (Pascal VOC) and `meadow` (YOLO) into subfolders of `folder`.

    `leaf` is labelled in two of them; butterflies over the pond, leaves on the desk, frogs and cups in the meadow are
    not. The same seed draws the same bytes, whatever the counts; what an earlier call has drawn there is replaced.

    Args:
        folder: Where the three subfolders go; made if missing.
        seed: Decides every picture.
        train: Training pictures of each dataset.
        val: Validation pictures of each dataset.
        progress: Called with the path of every picture that is written.

    Raises:
        DataError: a count is below 1, a subfolder holds what the demo did not draw, or the folder cannot be written.
    """
    for what, number in (("train", train), ("val", val)):
        if number < 1:
            raise DataError(f"expected at least one picture, got {number}", where=what)
    written = []
    for index, field in enumerate(FIELDS):
        home, form = folder / field.name, FORMATS[field.name]
        with _writing(home):
            _clear(home)
            _mark(home, field)
            pictures = []
            for split, count in ((TRAIN, train), (VAL, val)):
                for number in range(count):
                    rng = np.random.default_rng([seed, index, split == VAL, number])
                    path = home / form.picture_folder(split) / f"{field.name}_{split}_{number:04d}.jpg"
                    pictures.append(_save(draw_scene(field, rng), path, split, rng))
                    if progress is not None:
                        progress(path)
            form.annotate(home, pictures, field.labelled)
        dataset = DemoDataset(
            name=field.name, folder=home, format=form.name, categories=field.labelled, pictures=tuple(pictures)
        )
        written.append(dataset)
    return tuple(written)


def write_unseen(folder: Path, seed: int, count: int) -> tuple[DemoPicture, ...]:
    """Draws pictures of all fields that are in no dataset, without annotations, straight into `folder`.

    In the last ones (one in three, at most two) objects of two fields lie together.

    Raises:
        DataError: `count` is below 1, the folder holds what the demo did not draw, or it cannot be written.
    """
    if count < 1:
        raise DataError(f"expected at least one picture, got {count}", where="count")
    mixed = min(2, count // 3)
    pictures = []
    with _writing(folder):
        _clear(folder)
        _mark(folder, None)
        for number in range(count):
            together = number >= count - mixed
            field = FIELDS[number - count] if together else FIELDS[number % len(FIELDS)]
            rng = np.random.default_rng([seed, len(FIELDS), number])
            scene = draw_scene(field, rng, guests=_GUESTS[field.name] if together else ())
            name = f"{number + 1:02d}_{field.name}{'_mixed' if together else ''}.jpg"
            pictures.append(_save(scene, folder / name, "unseen", rng))
    return tuple(pictures)


def _save(scene: Scene, path: Path, split: str, rng: np.random.Generator) -> DemoPicture:
    height, width = scene.picture.shape[:2]
    quality = int(rng.integers(82, 96))
    _, encoded = cv2.imencode(".jpg", scene.picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.tobytes())
    return DemoPicture(path=path, split=split, size=(width, height), objects=scene.objects)


def _clear(folder: Path) -> None:
    """Takes away what an earlier run has drawn; anything else is left alone."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    marker = folder / _MARKER
    if not marker.is_file() or not marker.read_text(encoding="utf-8", errors="replace").startswith(_MADE):
        raise DataError(
            "the demo would draw here, but there are files that it did not draw", where=folder, hint="another folder"
        )
    shutil.rmtree(folder)


def _mark(folder: Path, field: Field | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = "Pictures of all fields, in no dataset, without annotations."
    if field is not None:
        labelled, foreign = ", ".join(field.labelled), ", ".join(field.foreign)
        content = f"Labelled: {labelled}.\nIn the pictures, but not labelled: {foreign}."
    (folder / _MARKER).write_text(f"{_MADE}\n\n{content}\n", encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the demo's pictures cannot be written: {error.strerror or error}"
        raise DataError(what, where=folder, hint="a folder that can be written, with 50 MB free") from error
