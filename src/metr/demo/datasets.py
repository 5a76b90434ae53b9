"""Three small datasets of different fields, formats and label spaces, and images that none of them holds."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as Xml

import cv2
import numpy as np

from metr.demo.scenes import FIELDS, DrawnObject, Field, Scene, draw_scene
from metr.errors import DataError

TRAIN, VAL = "train", "val"


@dataclass(frozen=True, kw_only=True)
class DemoImage:
    """A written image and all objects in it, unlabelled ones included. `size` is (width, height)."""

    path: Path
    split: str
    size: tuple[int, int]
    objects: tuple[DrawnObject, ...]

    @property
    def labelled(self) -> tuple[DrawnObject, ...]:
        """The objects that its dataset labels."""
        return tuple(item for item in self.objects if item.labelled)

    @property
    def unlabelled(self) -> tuple[DrawnObject, ...]:
        """Objects of other fields, which stand here without a label."""
        return tuple(item for item in self.objects if not item.labelled)


@dataclass(frozen=True, kw_only=True)
class DemoFormat:
    """One annotation format: where a split's images lie in the dataset's folder, and what writes the annotations."""

    name: str
    image_folder: Callable[[str], Path]
    annotate: Callable[[Path, Sequence[DemoImage], tuple[str, ...]], None]


def _annotate_coco(folder: Path, rendered_images: Sequence[DemoImage], categories: tuple[str, ...]) -> None:
    named = [{"id": number, "name": name} for number, name in enumerate(categories, 1)]
    for split in (TRAIN, VAL):
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for rendered in (rendered for rendered in rendered_images if rendered.split == split):
            image_id, (width, height) = len(images) + 1, rendered.size
            images.append({"id": image_id, "file_name": rendered.path.name, "width": width, "height": height})
            for item in rendered.labelled:
                x0, y0, x1, y1 = item.box
                size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
                category = categories.index(item.name) + 1
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **size})
        content = {"images": images, "annotations": annotations, "categories": named}
        _write(folder / "annotations" / f"instances_{split}.json", json.dumps(content, indent=1))


def _annotate_voc(folder: Path, rendered_images: Sequence[DemoImage], categories: tuple[str, ...]) -> None:
    del categories  # the format lists none: a name is known once an object bears it
    for rendered in rendered_images:
        root = Xml.Element("annotation")
        _child(root, folder="JPEGImages", filename=rendered.path.name)
        _child(Xml.SubElement(root, "size"), width=rendered.size[0], height=rendered.size[1], depth=3)
        for item in rendered.labelled:
            node = Xml.SubElement(root, "object")
            _child(node, name=item.name, difficult=0)
            x0, y0, x1, y1 = item.box  # whole pixels around it, counted from 0 as today's labelling tools do
            low, high = (math.floor(x0), math.floor(y0)), (math.ceil(x1), math.ceil(y1))
            corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), low + high, strict=True))
            _child(Xml.SubElement(node, "bndbox"), **corners)
        Xml.indent(root)
        _write(folder / "Annotations" / f"{rendered.path.stem}.xml", Xml.tostring(root, encoding="unicode") + "\n")
    for split in (TRAIN, VAL):
        stems = [rendered.path.stem for rendered in rendered_images if rendered.split == split]
        _write(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))


def _annotate_yolo(folder: Path, rendered_images: Sequence[DemoImage], categories: tuple[str, ...]) -> None:
    for rendered in rendered_images:
        width, height = rendered.size
        rows = []
        for item in rendered.labelled:
            x0, y0, x1, y1 = item.box
            numbers = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
            rows.append(" ".join([str(categories.index(item.name)), *(f"{number:.6f}" for number in numbers)]) + "\n")
        _write(rendered.path.parents[1] / "labels" / f"{rendered.path.stem}.txt", "".join(rows))
    names = ", ".join(f"'{name}'" for name in categories)
    lines = ["train: ../train/images", "val: ../valid/images", "", f"nc: {len(categories)}", f"names: [{names}]"]
    _write(folder / "data.yaml", "\n".join(lines) + "\n")


def _child(parent: Xml.Element, **texts: object) -> None:
    for tag, text in texts.items():
        Xml.SubElement(parent, tag).text = str(text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _yolo_folder(split: str) -> Path:
    return Path("train" if split == TRAIN else "valid") / "images"


COCO = DemoFormat(name="coco", image_folder=Path, annotate=_annotate_coco)
VOC = DemoFormat(name="voc", image_folder=lambda _: Path("JPEGImages"), annotate=_annotate_voc)
YOLO = DemoFormat(name="yolo", image_folder=_yolo_folder, annotate=_annotate_yolo)


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
