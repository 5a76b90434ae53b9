"""Writes the made datasets as their owners would have them: COCO JSON, Pascal VOC and YOLO folders."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as Xml

from metr.demo.scenes import DrawnObject

TRAIN, VAL = "train", "val"


@dataclass(frozen=True, kw_only=True)
class DemoImage:
    """A written rendered and everything in it, its unlabelled objects included. `size` is (width, height)."""

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
