"""One made-up dataset, written to disk in every format and layout that the readers support."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

NAMES = ("red cell", "white-cell", "пятно")


@dataclass(frozen=True)
class ExpectedImage:
    """One image of the truth: boxes are xyxy in whole pixels."""

    name: str
    width: int
    height: int
    boxes: tuple[tuple[int, int, int, int], ...]
    labels: tuple[str, ...]


Truth = Mapping[str, Sequence[ExpectedImage]]


def made_up(seed: int = 0, splits: Mapping[str, int] | None = None) -> Truth:
    """A truth with unusual names, images without objects and boxes at the border."""
    rng = np.random.default_rng(seed)
    truth = {}
    for split, count in (splits or {"train": 5, "val": 3, "test": 2}).items():
        images = []
        for number in range(count):
            width, height = int(rng.integers(20, 60)), int(rng.integers(20, 60))
            boxes = []
            for _ in range(0 if number == 1 else int(rng.integers(1, 5))):
                left, right = sorted(rng.choice(width + 1, 2, replace=False))
                top, bottom = sorted(rng.choice(height + 1, 2, replace=False))
                boxes.append((int(left), int(top), int(right), int(bottom)))
            labels = [NAMES[number % 3], *(str(rng.choice(NAMES)) for _ in boxes[1:])][: len(boxes)]
            name = f"{split} {number:02d} снимок.{'JPG' if number % 2 else 'jpg'}"
            images.append(ExpectedImage(name, width, height, tuple(boxes), tuple(labels)))
        truth[split] = images
    return truth


def save_image(path: Path, width: int = 40, height: int = 30) -> Path:
    """A grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (127, 127, 127)).save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return path


def write_json(path: Path, content: Any) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def write_text(path: Path, text: str) -> Path:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def hidden_beside(root: Path) -> None:
    """Puts into a folder what macOS leaves: `._NAME` beside each file, `.DS_Store` in each folder, `__MACOSX`."""
    attributes = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(99)
    everything = sorted(root.rglob("*"))
    for path in everything:
        if path.is_file():
            copy = root / "__MACOSX" / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.with_name(f"._{path.name}").write_bytes(attributes)
            path.with_name(f"._{path.name}").write_bytes(attributes)
        else:
            (path / ".DS_Store").write_bytes(attributes)


def coco_content(images: Sequence[ExpectedImage], first_id: int = 3) -> dict[str, Any]:
    """The JSON of one split: ids with gaps, no `area`, no `iscrowd`."""
    ids = {name: 10 * (place + 1) for place, name in enumerate(NAMES)}
    listed, annotations = [], []
    for number, image in enumerate(images):
        image_id = first_id + 7 * number
        listed.append(
            {
                "id": image_id,
                "file_name": image.name,
                "width": image.width,
                "height": image.height,
            }
        )
        for (left, top, right, bottom), label in zip(image.boxes, image.labels, strict=True):
            box = [left, top, right - left, bottom - top]
            polygon = [[left, top, right, top, right, bottom]]
            annotations.append(
                {"id": len(annotations), "image_id": image_id, "category_id": ids[label], "bbox": box}
                | {"segmentation": polygon}
            )
    # Annotations of one image need not stand together.
    annotations = annotations[::2] + annotations[1::2]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": listed, "annotations": annotations, "categories": categories}


def coco_plain(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write_json(root / "annotations" / f"instances_{split}2017.json", coco_content(images))
        write_json(root / "annotations" / f"captions_{split}2017.json", {"images": [], "annotations": []})
        _save(root / f"{split}2017", images)


def coco_images_folder(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write_json(root / "annotations" / f"{split}.json", coco_content(images))
        _save(root / "images", images)


def coco_roboflow(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        folder = root / {"val": "valid"}.get(split, split)
        write_json(folder / "_annotations.coco.json", coco_content(images))
        _save(folder, images)


def coco_root(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        renamed = [ExpectedImage(f"{split}\\{item.name}", *list(vars(item).values())[1:]) for item in images]
        write_json(root / f"my_{split}_boxes.json", coco_content(renamed))
        _save(root / "images" / split, images)


def voc_xml(image: ExpectedImage, size: bool = True) -> str:
    """The XML of an image."""
    objects = "".join(
        f"<object><name>{label}</name><difficult>0</difficult><part><bndbox><xmin>1</xmin></bndbox></part>"
        f"<bndbox><xmax>{box[2]}</xmax><xmin>{box[0]}.0</xmin><ymin>{box[1]}</ymin><ymax>{box[3]}</ymax></bndbox></object>"
        for box, label in zip(image.boxes, image.labels, strict=True)
    )
    width, height = (image.width, image.height) if size else (0, 0)
    dimensions = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    source = "<source><database>Unknown</database></source>"
    return f"<annotation><filename>{image.name}</filename>{source}{dimensions}{objects}</annotation>"


def voc_listed(root: Path, truth: Truth) -> None:
    everything = []
    for split, images in truth.items():
        stems = [Path(image.name).stem for image in images]
        write_text(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))
        write_text(root / "ImageSets" / "Main" / f"cell_{split}.txt", "\n".join(f"{stem} -1" for stem in stems))
        everything += stems if split != "test" else []
        for image in images:
            write_text(root / "Annotations" / f"{Path(image.name).stem}.xml", voc_xml(image))
        _save(root / "JPEGImages", images)
    write_text(root / "ImageSets" / "Main" / "trainval.txt", "\n".join(everything))


def voc_devkit(root: Path, truth: Truth) -> None:
    for year, part in (("VOC2007", slice(0, 1)), ("VOC2012", slice(1, None))):
        voc_listed(root / "VOCdevkit" / year, {split: images[part] for split, images in truth.items()})


def voc_beside(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        for image in images:
            write_text(root / "images" / split / f"{Path(image.name).stem}.xml", voc_xml(image, size=False))
        _save(root / "images" / split, images)


def voc_folders(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        for image in images:
            write_text(root / split / "annotations" / f"{Path(image.name).stem}.xml", voc_xml(image))
        _save(root / split / "images", images)


def yolo_row(image: ExpectedImage, box: tuple[int, int, int, int]) -> str:
    """Centre and size as fractions of the image."""
    left, top, right, bottom = box
    values = (left + right) / 2 / image.width, (top + bottom) / 2 / image.height
    return " ".join(repr(value) for value in (*values, (right - left) / image.width, (bottom - top) / image.height))


def yolo_polygon(image: ExpectedImage, box: tuple[int, int, int, int]) -> str:
    """A diamond that touches all sides of the box."""
    left, top, right, bottom = box
    middle, centre = (left + right) / 2, (top + bottom) / 2
    points = [(middle, top), (right, centre), (middle, bottom), (left, centre)]
    return " ".join(f"{x / image.width!r} {y / image.height!r}" for x, y in points)


def yolo_labels(
    folder: Path,
    images: Sequence[ExpectedImage],
    row: Callable[[ExpectedImage, tuple[int, int, int, int]], str] = yolo_row,
) -> None:
    """The text files of images; images without objects have none."""
    for image in images:
        boxes = zip(image.boxes, image.labels, strict=True)
        lines = [f"{NAMES.index(label)} {row(image, box)}" for box, label in boxes]
        if lines:
            write_text(folder / f"{Path(image.name).stem}.txt", "\n".join(lines) + "\n")


def yolo_plain(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        _save(root / "images" / split, images)
        yolo_labels(root / "labels" / split, images)
    splits = {split: f"images/{split}" for split in truth}
    write_text(root / "data.yaml", yaml.safe_dump({**splits, "names": dict(enumerate(NAMES))}, allow_unicode=True))


def yolo_roboflow(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        folder = root / {"val": "valid"}.get(split, split)
        _save(folder / "images", images)
        yolo_labels(folder / "labels", images)
    description = {"train": "../train/images", "val": "../valid/images", "nc": 3, "names": list(NAMES)}
    write_text(root / "data.yaml", yaml.safe_dump(description, allow_unicode=True))


def yolo_travelled(root: Path, truth: Truth) -> None:
    """The description names a folder of another machine; images lie in subfolders; a split is a list of folders."""
    for split, images in truth.items():
        _save(root / "sets" / split / "a" / "images", images[:1])
        _save(root / "sets" / split / "b" / "images", images[1:])
        yolo_labels(root / "sets" / split / "a" / "labels", images[:1], yolo_polygon)
        yolo_labels(root / "sets" / split / "b" / "labels", images[1:], yolo_polygon)
    splits = {split: [f"sets/{split}/a/images", f"sets/{split}/b"] for split in truth}
    description = {
        "path": "C:\\Users\\bob\\datasets\\cells",
        **splits,
        "names": {str(i): n for i, n in enumerate(NAMES)},
    }
    write_text(root / "cells.yml", yaml.safe_dump(description, allow_unicode=True))


def yolo_lists(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        _save(root / "images", images)
        yolo_labels(root / "labels", images)
        write_text(root / f"{split}.txt", "\n".join(f"./images/{image.name}" for image in images))
    description = {**{split: f"{split}.txt" for split in truth}, "names": list(NAMES)}
    write_text(root / "data.yaml", yaml.safe_dump(description, allow_unicode=True))


def yolo_darknet(root: Path, truth: Truth) -> None:
    lines = ["classes = 3", "names = data/obj.names", "backup = backup/"]
    for split, images in truth.items():
        _save(root / "data" / "obj", images)
        yolo_labels(root / "data" / "obj", images)
        write_text(
            root / "data" / f"{split}.txt",
            "\n".join(f"build/data/obj/{image.name}" for image in images),
        )
        lines.append(f"{ {'val': 'valid'}.get(split, split) } = data/{split}.txt")
    write_text(root / "data" / "obj.names", "\n".join(NAMES) + "\n")
    write_text(root / "data" / "obj.data", "\n".join(lines))


def yolo_names_file(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        _save(root / split, images)
        yolo_labels(root / split, images)
        write_text(root / split / "_darknet.labels", "\n".join(NAMES))


def csv_header(root: Path, truth: Truth, scale: bool = False) -> None:
    for split, images in truth.items():
        rows: list[Sequence[object]] = [("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax")]
        for item in images:
            limit = (item.width, item.height) * 2 if scale else (1, 1, 1, 1)
            for box, label in zip(item.boxes, item.labels, strict=True):
                corners = [value / side for value, side in zip(box, limit, strict=True)] if scale else box
                rows.append((item.name, item.width, item.height, label, *corners))
            if not item.boxes:
                rows.append((item.name, item.width, item.height, "", "", "", "", ""))
        _write_csv(root / "images" / f"{split}_labels.csv", rows)
        _save(root / "images" / split, images)


def csv_relative(root: Path, truth: Truth) -> None:
    csv_header(root, truth, scale=True)


def csv_plain(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        rows: list[Sequence[object]] = []
        for item in images:
            rows += [(f"images/{item.name}", *box, label) for box, label in zip(item.boxes, item.labels, strict=True)]
            if not item.boxes:
                rows.append((f"images/{item.name}", "", "", "", "", ""))
        _write_csv(root / f"{split}.csv", rows)
        _save(root / "images", images)
    _write_csv(root / "classes.csv", [(name, number) for number, name in enumerate(NAMES)])


def csv_folders(root: Path, truth: Truth) -> None:
    """A file of the same name in each split's folder, semicolons, other names of the columns."""
    for split, images in truth.items():
        lines = ["x1;y1;x2;y2;label;image"]
        for item in images:
            boxes = zip(item.boxes, item.labels, strict=True)
            lines += [";".join([*map(str, box), label, Path(item.name).stem]) for box, label in boxes]
            lines += [] if item.boxes else [f";;;;;{Path(item.name).stem}"]
        write_text(root / split / "_annotations.csv", "\ufeff" + "\r\n".join(lines))
        _save(root / split, images)


LAYOUTS: dict[str, tuple[str, Callable[[Path, Truth], None]]] = {
    "coco plain": ("coco", coco_plain),
    "coco images folder": ("coco", coco_images_folder),
    "coco roboflow": ("coco", coco_roboflow),
    "coco root": ("coco", coco_root),
    "voc listed": ("voc", voc_listed),
    "voc devkit": ("voc", voc_devkit),
    "voc beside": ("voc", voc_beside),
    "voc folders": ("voc", voc_folders),
    "yolo plain": ("yolo", yolo_plain),
    "yolo roboflow": ("yolo", yolo_roboflow),
    "yolo travelled": ("yolo", yolo_travelled),
    "yolo lists": ("yolo", yolo_lists),
    "yolo darknet": ("yolo", yolo_darknet),
    "yolo names file": ("yolo", yolo_names_file),
    "csv header": ("csv", csv_header),
    "csv relative": ("csv", csv_relative),
    "csv plain": ("csv", csv_plain),
    "csv folders": ("csv", csv_folders),
}


def _save(folder: Path, images: Sequence[ExpectedImage]) -> None:
    for image in images:
        save_image(folder / image.name, image.width, image.height)


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
